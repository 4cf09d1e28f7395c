"""`memflow doctor` names what is there and gives the reason for what is not."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from memflow.cli import doctor, main
from memflow.errors import install_command

WITHOUT = """
import sys
for name in {missing!r}:
    sys.modules[name] = None
from memflow.cli.doctor import collect
import json
print(json.dumps(collect()))
"""


def collect_without(*missing):
    code = WITHOUT.format(missing=missing)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def test_facts_of_this_machine():
    import torch

    facts = doctor.collect()
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["torch"]["version"] == torch.__version__
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert facts["backends"]["torch"] is None
    assert facts["cpu"]["cores"] >= 1
    assert facts["libx264"] is None
    assert set(facts["packages"]) >= {"diffusers", "transformers", "peft", "av"}
    json.dumps(facts)


@pytest.mark.parametrize("missing", [("torch",), ("av", "memflow_kernels")])
def test_what_is_missing_has_a_reason_and_nothing_fails(missing):
    facts = collect_without(*missing, "diffusers", "typer", "rich", "matplotlib")
    reasons = {"torch": facts["torch"], "av": facts["libx264"], "memflow_kernels": facts["backends"].get("every")}
    assert all(name in reasons[name] for name in missing)


def test_a_broken_driver_is_no_gpu(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def broken(_):
        raise RuntimeError("driver too old\nmore")

    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    assert doctor.collect()["gpus"] == []


def test_a_gpu_is_described(monkeypatch):
    import torch

    gpu = SimpleNamespace(name="Some GPU", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    assert doctor.collect()["gpus"] == [{"name": "Some GPU", "capability": "9.0", "memory_gib": 80}]


def test_the_compiler_is_asked_for_its_release(monkeypatch, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert doctor.collect()["nvcc"] == f"13.0.88, {nvcc}"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    assert doctor.collect()["nvcc"] is None


WHERE = """
import json
from memflow.cli.doctor import collect
print(json.dumps(collect()["cuda_kernels"]))
"""


def test_how_the_cuda_kernels_would_be_built(tmp_path):
    """Nothing is compiled: the table says that it can be and with what, or why it cannot."""
    tools = tmp_path / "bin"
    tools.mkdir()
    nvcc = tools / "nvcc"
    environment = {"PATH": str(tools), "CUDA_HOME": str(tmp_path), "MEMFLOW_CUDA_CACHE": str(tmp_path / "cache")}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)}

    def said():
        command = [sys.executable, "-c", WHERE]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return json.loads(result.stdout)

    nvcc.write_text("#!/bin/sh\necho 'release 12.4, V12.4.131'; echo compute_80; echo compute_90\n")
    nvcc.chmod(0o755)
    (tools / "ninja").symlink_to(nvcc)
    assert f"not built yet; the first use on a GPU does it with nvcc 12.4.131 ({nvcc})" in said()
    assert f"into {tmp_path / 'cache'}, for 8.0;9.0a " in said()
    assert not (tmp_path / "cache").exists()
    nvcc.write_text("#!/bin/sh\necho 'libfoo.so: cannot open' >&2; exit 127\n")
    assert said() == f"not built and cannot be: {nvcc} --version failed: libfoo.so: cannot open"


def test_the_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    kernels = ("torch backend", "triton backend", "cuda backend", "nvcc", "CUDA kernels")
    for word in ("python", *kernels, "diffusers", "libx264"):
        assert word in output


def test_the_table_when_everything_is_missing(capsys, monkeypatch):
    facts = doctor.collect()
    facts |= {"torch": "ImportError: no", "gpus": [], "triton": None, "nvcc": None, "libx264": "why"}
    facts |= {"memflow_kernels": None, "cpu": {"cores": 2, "threads": None}, "backends": {"torch": "broken"}}
    facts["packages"] = dict.fromkeys(facts["packages"])
    monkeypatch.setenv("COLUMNS", "100")
    doctor.show(facts)
    output = " ".join(capsys.readouterr().out.split())
    for word in ("ImportError: no", "broken", install_command("model"), "why"):
        assert word in output


def test_the_base_install_has_a_doctor():
    code = (
        "import sys\n"
        "for name in ('typer', 'rich', 'diffusers', 'transformers', 'av', 'matplotlib'): sys.modules[name] = None\n"
        "from memflow.cli import main\n"
        "sys.exit(main(['doctor']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "torch backend" in result.stdout
