"""Digests: they tell one model's weights from another's, and which text encoder lies in a pipeline's folder."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from memflow.errors import MemFlowError
from memflow.files import cache_folder, write_whole
from memflow.models.base import sampled

_KNOWN: WeakKeyDictionary[nn.Module, tuple[tuple, str]] = WeakKeyDictionary()
_SMALL = 32 * 2**20  # bytes of a file that is read each time: quicker than asking whether it is known


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers.

    Computed once per module and again when a tensor has been replaced or written to; some numbers of every tensor are
    compared too, as `sampled` says why.

    Args:
        module: any model; its tensors may lie on any device.

    Raises:
        MemFlowError: its state holds something else than tensors, as torch.ao's quantised layers do.
    """
    tensors = {name: getattr(tensor, "qdata", tensor) for name, tensor in module.state_dict().items()}  # torchao's
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.is_quantized:
            kind = "a quantised tensor" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
            raise MemFlowError(f"{type(module).__name__}: {name} is {kind}: a state can tell plain tensors apart only")
    seen = tuple((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors.values())
    seen += (*tensors, *sampled(tensors.values()))
    known = _KNOWN.get(module)
    if known is None or known[0] != seen:
        total = hashlib.sha256()
        for name, tensor in tensors.items():
            total.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
            total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        known = _KNOWN[module] = (seen, total.hexdigest())
    return known[1]


def encoder_digest(model: Path) -> str:
    """SHA-256 over names and contents of all files of a pipeline's text encoder and tokenizer.

    A large file (11 GB of a real model: some ten seconds) is read once; its digest is kept for its place, size and
    time of change, under XDG_CACHE_HOME.

    Args:
        model: The folder of the pipeline.
    """
    digest = hashlib.sha256()
    for part in ("text_encoder", "tokenizer"):
        for path in sorted(path for path in (model / part).rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(model)} {_contents(path)}\n".encode())
    return digest.hexdigest()


def prompt_folder(encoder: str) -> Path:
    """Where the embeddings of an encoder's prompts are kept.

    Args:
        encoder: As `encoder_digest` gives it: one folder for all equal encoders.
    """
    return cache_folder() / "prompts" / encoder[:32]


def _contents(path: Path) -> str:
    stat = path.stat()
    if stat.st_size <= _SMALL:
        return _read(path)
    key = f"{path.resolve()} {stat.st_dev} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
    kept = cache_folder() / "digests" / hashlib.sha256(key.encode()).hexdigest()
    with suppress(OSError, ValueError):
        digest, check = kept.read_text().split()
        if check == _check(key, digest):
            return digest
    digest = _read(path)
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, lambda file: file.write(f"{digest} {_check(key, digest)}\n".encode()))
    return digest


def _check(key: str, digest: str) -> str:
    """Tells a damaged entry from a whole one."""
    return hashlib.sha256(f"{key} {digest}".encode()).hexdigest()


def _read(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
