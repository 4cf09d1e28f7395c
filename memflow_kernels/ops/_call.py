"""How an op is run: through torch's dispatcher where somebody listens there, straight to the backend where nobody does.

A call through the dispatcher to an operator written in Python costs some 0.2 ms of the host's time, more than a small
model's attention, and a GPU waits for it. It buys what only autograd, tracing, modes and tensor subclasses need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from ..backends import dispatch

_PLAIN = (Tensor, nn.Parameter)


def call(op: Callable, name: str, *arguments, written: Iterable[Tensor] = ()):
    """Results of operator `op`, called `memflow::<name>`. The first argument is a tensor and names the device.

    written: the arguments that it changes in place. A kernel's writes are unknown to autograd, which must know of them:
    a backward that needs what stood there before then raises, where it would compute from what stands there now.
    """
    if torch.compiler.is_compiling() or _somebody_listens(arguments):
        return op(*arguments)
    result = dispatch(name, arguments[0].device)(*arguments)
    for x in written:
        if not x.is_inference():
            increment_version(x)
    return result


def _somebody_listens(arguments: tuple) -> bool:
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    if torch._C._get_tracing_state() is not None or forward_ad._current_level >= 0:
        return True
    graded = torch.is_grad_enabled()
    tensors = (x for x in arguments if isinstance(x, Tensor))
    return any(type(x) not in _PLAIN or (graded and x.requires_grad) for x in tensors)
