"""Result files, tables, plots, targets."""

import csv
import json

import pytest

from memflow_bench.cases import load_cases
from memflow_bench.colours import KNOWN, OWN, PARTS, colours_of
from memflow_bench.command import main
from memflow_bench.providers import PROVIDERS
from memflow_bench.rows import Result, Row, read, write
from memflow_bench.table import markdown
from memflow_bench.targets import targets

FACTS = {"command": "python -m benchmarks run", "cpu": "a cpu", "cores": 2, "threads": 2, "torch": "2.13",
         "triton": None, "commit": "abc", "time": "now", "load_average": [0.0, 0.0, 0.0]}  # fmt: skip
CEILINGS = {dtype: {"flops": 1e12, "bytes": 1e11} for dtype in ("float32", "bfloat16")}


def row(provider, seconds, workload="layer", case="wan-1.3b-480p", activated=False, device="cpu", **more):
    dtype = more.pop("dtype", "float32")
    title = f"{workload} {case} {dtype}"
    return Row(workload, case, activated, dtype, device, provider, title, seconds=seconds, error=1e-7, **more)


def verdicts(rows):
    return {target.what: (target.value, target.verdict) for target in targets(rows, CEILINGS)}


def test_targets_of_the_cpu_are_read_pair_by_pair():
    rows = [
        row("ours (torch)", [1.0, 2.0, 4.0]),
        row("ours (torch)", [1.0, 1.0, 1.0], activated=True),
        row("published path", [1.2, 2.4, 4.0]),
        row("ours (torch)", [1.0], "update"),
        row("published path", [19.0], "update"),
        row("ours (torch)", [1.0], "stream", "toy", frames=96),
        row("published path", [1.5], "stream", "toy", frames=96),
        row("no memory attention at all", [0.9], "stream", "toy", status="floor"),
        row("torch's attention alone", [1.2], "stream", "toy", status="floor"),
    ]
    assert verdicts(rows) == {
        "attention layer, dense, float32, against the dense published path": ("1.20x", "reached"),
        "attention layer, activated, float32, against the dense published path (fewer keys: not like for like)": (
            "2.40x",
            "reached",
        ),
        "memory update, float32, against the published path": ("19.00x", "NOT reached"),
        "toy stream, against the published path": ("1.50x", "reached"),
        "the same if memory attention took no time": ("1.67x", "the most that can be reached"),
        "the same if norm, rotation and write took no time": ("1.25x", "the most that can be reached"),
    }


def test_targets_of_a_gpu():
    gpu = {"device": "cuda", "dtype": "bfloat16"}
    rows = [
        row("ours (triton)", [0.8], "attention", activated=True, flops=80, **gpu),
        row("SDPA flash", [1.5], "attention", flops=100, **gpu),
        row("SDPA cudnn", [1.0], "attention", flops=100, **gpu),
        row("ours (triton)", [1.0], "write", nbytes=79 * 10**9, **gpu),
        row("ours (triton)", [1.0], "stream", parts={"linear": 0.97, "memory": 0.03}, frames=12, **gpu),
        row("published path", [2.5], "stream", frames=12, **gpu),
        row("published path, no bank", [0.9], "stream", frames=12, **gpu),
    ]
    assert verdicts(rows) == {
        "ours (triton), activated, against SDPA cudnn, dense": ("1.25x", "reached"),
        "its TFLOP/s against theirs": ("1.00x", "reached"),
        "write: share of the copy bandwidth": ("79%", "NOT reached"),
        "1.3B chunk, dense, against the published path": ("2.50x", "reached"),
        "the same against the published path without a bank, dense": ("0.90x", "NOT reached"),
        "memory update: share of a chunk, dense": ("3.00%", "NOT reached"),
    }


def test_a_row_of_the_table():
    rows = [
        row("ours (torch)", [0.02, 0.02], "attention", flops=10**10, nbytes=10**8, peak_bytes=2**21),
        row("published path", [0.05, 0.05], "attention", flops=10**10, nbytes=10**8),
    ]
    table = markdown(FACTS, CEILINGS, rows)
    line = next(line for line in table.splitlines() if line.startswith("| ours (torch)"))
    expected = ["ours (torch)", "dense", "20 ms", "20 ms", "20 ms", "0.5", "50%", "5", "5%", "2", "1e-07", "2.50x"]
    assert [cell.strip() for cell in line.strip("|").split("|")] == expected


def test_a_result_file_becomes_a_table_a_csv_and_plots(tmp_path):
    rows = [
        row("ours (torch)", [0.2], "attention", case, flops=10**9, nbytes=10**7, activated=activated)
        for case in ("quarter", "quarter-bank6", "quarter-bank12")
        for activated in (False, True)
    ]
    rows += [row("ours (torch)", [0.5], "stream", "quarter", parts={"linear": 0.3, "attention": 0.2}, frames=12)]
    rows += [row("broken", [], "attention", "quarter", status="wrong", reason="relative error 0.5")]
    file = tmp_path / "result.json"
    write(file, Result(FACTS, CEILINGS, rows, load_cases()))
    assert read(file) == (FACTS, CEILINGS, rows, load_cases())
    assert main(["report", str(file), "-o", str(tmp_path / "out")]) == 0
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {
        "result.md", "result.csv", "result-sweep-memory.png", "result-roofline.png", "result-split.png"
    }  # fmt: skip
    lines = list(csv.DictReader((tmp_path / "out" / "result.csv").open()))
    assert [line["status"] for line in lines] == ["ok"] * 7 + ["wrong"]
    assert lines[0]["flops_per_s"] == "5000000000.0"
    assert lines[-1]["median"] is None
    assert "result-split.png" in (tmp_path / "out" / "result.md").read_text()


def test_a_file_with_the_old_name_of_the_published_path_is_read(tmp_path):
    rows = [row("ours (torch)", [0.2]), row("reference path", [0.5]), row("reference path, no bank", [0.4])]
    write(tmp_path / "old.json", Result(FACTS, CEILINGS, rows, load_cases()))
    found = read(tmp_path / "old.json").rows
    assert [line.provider for line in found] == ["ours (torch)", "published path", "published path, no bank"]
    assert "2.50x" in markdown(FACTS, CEILINGS, found)


def test_another_file_is_refused(tmp_path, capsys):
    file = tmp_path / "other.json"
    file.write_text("{}")
    assert main(["report", str(file)]) == 2
    assert "not a benchmark result" in capsys.readouterr().out
    with pytest.raises(ValueError, match="cannot be read"):
        read(tmp_path / "none.json")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("rows"),
        lambda data: data.pop("environment"),
        lambda data: data["rows"][0].pop("workload"),
        lambda data: data["rows"][0].update(unknown=1),
        lambda data: data["rows"][0].update(seconds="fast"),
        lambda data: data["rows"].append("row"),
        lambda data: data["cases"].clear(),
        lambda data: data["cases"]["toy"].update(grid=3),
    ],
)
def test_a_damaged_file_is_named(tmp_path, capsys, damage):
    file = tmp_path / "result.json"
    write(file, Result(FACTS, CEILINGS, [row("ours (torch)", [1.0], case="toy")], {"toy": load_cases()["toy"]}))
    data = json.loads(file.read_text())
    damage(data)
    file.write_text(json.dumps(data))
    assert main(["report", str(file)]) == 2
    assert "result.json is damaged: " in capsys.readouterr().out


def test_like_for_like_and_dense_are_two_columns():
    rows = [
        row("ours (torch)", [1.0] * 5, "attention", activated=True),
        row("SDPA flash", [1.0] * 5, "attention", activated=True),
        row("published path", [1.1] * 5, "attention", activated=True),
        row("published path", [1.5] * 5, "attention"),
    ]
    table = markdown(FACTS | {"other_work": 0.02}, CEILINGS, rows)
    assert (
        "| ours (torch) | activated | 1 s | 1 s | 1 s | 1e-07 | 1.10x (1.10 to 1.10) | 1.50x (1.50 to 1.50) |" in table
    )
    assert "other work before the start 2%" in table
    same = table.split("### Activated, on the same keys")[1]
    assert "| SDPA flash | 1 s | 1.10x (1.10 to 1.10) | faster |" in same
    busy = markdown(FACTS | {"other_work": 0.6}, CEILINGS, rows)
    assert "**WARNING: other work keeps 60%" in busy
    assert "| SDPA flash | 1 s | 1.10x (1.10 to 1.10) | machine busy |" in busy


def test_no_roofline_where_a_point_lies_above_it(tmp_path):
    rows = [row("ours (torch)", [1e-3], "attention", "quarter", flops=11 * 10**8, nbytes=10**6)]
    write(tmp_path / "over.json", Result(FACTS, CEILINGS, rows, load_cases()))
    assert main(["report", str(tmp_path / "over.json")]) == 0
    assert not (tmp_path / "over-roofline.png").exists()
    text = (tmp_path / "over.md").read_text()
    assert "ours (torch) on quarter reached 110%" in text
    assert "| 1.1 | none | 1 | 1% |" in text


def test_a_provider_has_one_colour_and_none_shares_it():
    known = set(PROVIDERS)
    assert known == set(KNOWN)
    assert len({*KNOWN.values(), *OWN, *PARTS.values()}) == len(KNOWN) + len(OWN) + len(PARTS)
    few, many = colours_of(["mine", "SDPA flash"]), colours_of(["SDPA flash", "yours", "published path", "mine"])
    assert few["SDPA flash"] == many["SDPA flash"] == KNOWN["SDPA flash"]
    assert few["mine"] == many["mine"] != many["yours"]
    assert colours_of(["ours (torch), no bank"])["ours (torch), no bank"] == KNOWN["ours (torch)"]
