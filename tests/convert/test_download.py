"""`memflow download` against a hub of the test's own: licences and sizes first, then the files, whatever goes wrong."""

import io
import os
import subprocess
import sys
from collections import namedtuple
from types import SimpleNamespace
from typing import ClassVar

import pytest

from memflow.cli import main
from memflow.convert import download as hub

CONTENT = {
    "Wan-AI/Wan2.1-T2V-1.3B": {
        "diffusion_pytorch_model.safetensors": 5_676_070_424,
        "models_t5_umt5-xxl-enc-bf16.pth": 11_361_920_418,
        "Wan2.1_VAE.pth": 507_609_880,
        "google/umt5-xxl/spiece.model": 4_548_313,
        "google/umt5-xxl/tokenizer.json": 16_837_417,
        "assets/logo.png": 56_322,
    },
    "KlingTeam/MemFlow": {"base.pt": 5_676_000_000, "lora.pt": 2_800_000_000, "README.md": 9_056},
}


class Hub:
    """Answers as HfApi does for CONTENT, and writes tiny files."""

    content: ClassVar[dict] = CONTENT
    failing_at: ClassVar[str | None] = None
    fetched: ClassVar[list[str]] = []

    def model_info(self, repository, *, files_metadata):
        assert files_metadata
        if repository not in self.content:
            raise ConnectionError("Name or service not known\nmore about it")
        siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in self.content[repository].items()]
        card = SimpleNamespace(license="apache-2.0") if repository.startswith("Wan-AI/") else None
        return SimpleNamespace(siblings=siblings, sha="abc123", card_data=card)

    def hf_hub_download(self, repository, *, filename, revision, local_dir):
        assert revision == "abc123"
        if filename == self.failing_at:
            raise OSError("connection reset")
        path = local_dir / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{repository}/{filename}")
        self.fetched.append(filename)
        return str(path)


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(hub, "HfApi", Hub)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0, 10**12))
    monkeypatch.setattr(Hub, "fetched", [])
    return monkeypatch


def download(capsys, *arguments):
    code = main(["download", *map(str, arguments)])
    output = capsys.readouterr()
    return code, " ".join((output.out + output.err).split())


def test_licences_and_sizes_come_first_then_the_files(tmp_path, capsys):
    code, told = download(capsys, "memflow-1.3b", "-o", tmp_path / "files", "--yes")
    assert code == 0
    assert "licence: Apache-2.0; its model card: apache-2.0" in told
    assert "KlingTeam/MemFlow 5.68 GB base.pt 2.80 GB lora.pt licence: not stated on its card" in told
    assert "20.37 GB in all" in told
    assert f"next: memflow convert {tmp_path / 'files'} -o memflow-1.3b --preset memflow-1.3b" in told
    files = {str(p.relative_to(tmp_path / "files")) for p in (tmp_path / "files").rglob("*") if p.is_file()}
    assert files == {
        "MemFlow/base.pt",
        "MemFlow/lora.pt",
        "Wan2.1-T2V-1.3B/Wan2.1_VAE.pth",
        "Wan2.1-T2V-1.3B/google/umt5-xxl/spiece.model",
        "Wan2.1-T2V-1.3B/google/umt5-xxl/tokenizer.json",
        "Wan2.1-T2V-1.3B/models_t5_umt5-xxl-enc-bf16.pth",
    }


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("n", 2), ("", 2)])
def test_nothing_is_fetched_without_a_yes(answer, code, tmp_path, capsys, fake):
    fake.setattr(sys, "stdin", io.StringIO(f"{answer}\n"))
    found, told = download(capsys, "wan2.1-t2v-1.3b", "-o", tmp_path / "files")
    assert found == code
    assert bool(Hub.fetched) == (code == 0)
    assert ("nothing was downloaded (--yes answers the question)" in told) == (code == 2)


def test_no_connection_is_one_line(tmp_path, capsys):
    code, told = download(capsys, "longlive-1.3b", "-o", tmp_path / "files", "--yes")
    assert code == 2 and not (tmp_path / "files").exists()
    assert told.endswith(
        "memflow: Efficient-Large-Model/LongLive-1.3B cannot be fetched from the Hugging Face hub: "
        "Name or service not known"
    )


def test_a_broken_connection_keeps_what_there_is(tmp_path, capsys, fake):
    fake.setattr(Hub, "failing_at", "lora.pt")
    code, told = download(capsys, "memflow-1.3b", "-o", tmp_path / "files", "--yes")
    assert code == 2 and "KlingTeam/MemFlow cannot be fetched from the Hugging Face hub: connection reset" in told
    assert (tmp_path / "files" / "MemFlow" / "base.pt").exists()
    fake.setattr(Hub, "failing_at", None)
    assert download(capsys, "memflow-1.3b", "-o", tmp_path / "files", "--yes")[0] == 0


def test_what_cannot_work_is_said_before_asking(tmp_path, capsys, fake):
    code, told = download(capsys, "sora", "-o", tmp_path)
    assert code == 2 and "there is no model 'sora' to download; there are memflow-1.3b, longlive-1.3b" in told
    usage = namedtuple("usage", "total used free")
    fake.setattr("shutil.disk_usage", lambda _: usage(0, 0, 10**9))
    code, told = download(capsys, "memflow-1.3b", "-o", tmp_path, "--yes")
    assert code == 2 and ": needs 20.37 GB, and only 1.00 GB are free there" in told
    fake.setattr(Hub, "content", CONTENT | {"KlingTeam/MemFlow": {"model.pt": 1}})
    code, told = download(capsys, "memflow-1.3b", "-o", tmp_path, "--yes")
    assert code == 2 and "KlingTeam/MemFlow on the hub has no base.pt (any more); it has model.pt" in told
    assert not Hub.fetched


def test_offline_the_real_client_says_so_too(tmp_path):
    """No fake here: offline mode is what huggingface_hub itself refuses in."""
    code = "import sys; from memflow.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "download", "memflow-1.3b", "-o", str(tmp_path / "files"), "--yes"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("memflow: Wan-AI/Wan2.1-T2V-1.3B cannot be fetched from the Hugging Face hub: ")
    assert result.stderr.count("\n") == 1
