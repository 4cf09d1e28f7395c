"""The digest that tells one model's weights from another's."""

from __future__ import annotations

import hashlib
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from memflow.errors import MemFlowError
from memflow.models.base import sampled

_KNOWN: WeakKeyDictionary[nn.Module, tuple[tuple, str]] = WeakKeyDictionary()


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
