"""The operators of torch.ops.memflow, registered with torch.library: schema, fake, kernel, derivative.

Public parts of torch alone. Plain calls, torch.compile, torch.export, vmap, modes and tensor subclasses go through the
registered operator; eager calls without a gradient through a second one of the same schema and kernel, without the
layer of autograd. Where a gradient is wanted, a call goes through a torch.autograd.Function, which the transforms of
torch.func know as well; a compiler, and whoever calls torch.ops.memflow directly, is given the same formula.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.graph import increment_version
from torch.func import debug_unwrap

from ..backends import dispatch
from ..operators import NAMESPACE, OPERATORS, UNRECORDED

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
REGISTERED: dict[str, Registered] = {}


class Registered:
    """One operator, called with its arguments in the order of its schema; the first, a tensor, names the device."""

    def __init__(self, name: str, fake: Callable, backward: tuple[Callable, Callable] | None = None) -> None:
        """fake: gives results of the right shapes and dtypes. backward: setup_context and formula as torch.library
        takes them; by default those of the operator `<name>_backward`, or a refusal where there is none."""
        self.name = name
        written = [place for place, kind in enumerate(OPERATORS[name].arguments.values()) if "!" in kind]
        kernel = _kernel(name, written)
        self.operator = self._unrecorded = _define(name, name, kernel, fake)
        if not written:
            # The layer of autograd that `register_autograd` puts around a call is Python: it costs as much as a tenth
            # of a small call where there is nothing to record.
            self._unrecorded = _define(name + UNRECORDED, name, self._unless_needed(kernel), fake)
            # autograd would warn where `_unless_needed` has what it misses
            _LIBRARY.impl(name + UNRECORDED, torch.library.fallthrough_kernel, "Autograd")
            setup, formula = backward or (derived if f"{name}_backward" in OPERATORS else _refused)(name)
            torch.library.register_autograd(f"{NAMESPACE}::{name}", formula, setup_context=setup, lib=_LIBRARY)
            self._function = _function(self.operator, setup, formula)
        REGISTERED[name] = self

    def __call__(self, *arguments):
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():  # autograd records nothing here
            return self.operator(*arguments)
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        for x in tensors:
            primal, tangent = unpack_dual(x)
            if tangent is not None:
                raise _no_tangents(self.name)
            if primal is x:  # no level of forward mode is open: the others have no tangent either
                break
        if torch.is_grad_enabled() and any(map(_needs_gradient, tensors)):
            return self._function.apply(*arguments)
        return self._unrecorded(*arguments)

    def _unless_needed(self, kernel: Callable) -> Callable:
        """For graphs (make_fx) that were captured where nothing was to be recorded, and are run where something is."""

        def run(*arguments):
            if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
                return self.operator(*arguments)
            return kernel(*arguments)

        return run

    def recorded(self, *arguments):
        """The call where a gradient may be wanted although no argument says so: of a backward inside torch.func."""
        return self.operator(*arguments) if torch.compiler.is_compiling() else self._function.apply(*arguments)


def _needs_gradient(x: Tensor) -> bool:
    """Whether x does or, in a transform of torch.func, what it wraps: a tensor of vmap never says so itself."""
    while not x.requires_grad:
        if (inner := debug_unwrap(x, recurse=False)) is x:
            return False
        x = inner
    return True


def _define(defined: str, name: str, kernel: Callable, fake: Callable) -> Callable:
    """An operator `defined` with the schema of `name`."""
    _LIBRARY.define(defined + OPERATORS[name].schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(defined, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{defined}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), defined).default


def _kernel(name: str, written: list[int]) -> Callable:
    """What torch calls: the backend's function. Autograd is told of the arguments that are written to: a backward that
    needs what stood there before then raises, where it would compute from what stands there now."""

    def run(*arguments):
        device = arguments[0].device
        if torch.is_autocast_enabled(device.type):  # else it would change the arithmetic of the formulas
            with torch.autocast(device.type, enabled=False):
                return run(*arguments)
        result = dispatch(name, device)(*arguments)
        for place in written:
            if not arguments[place].is_inference():
                increment_version(arguments[place])
        return result

    return run


def _no_tangents(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"{name} has no forward-mode derivative (torch.func.jvp, torch.func.hessian, torch.autograd.forward_ad), but "
        "an argument has a tangent: use reverse mode (backward, torch.func.grad, torch.func.vjp)"
    )


def _function(operator: Callable, setup: Callable, backward: Callable) -> type[torch.autograd.Function]:
    def forward(*arguments):
        return operator(*arguments)

    def jvp(ctx, *tangents):  # of what is differentiated in reverse mode as well, as torch.func.hessian does
        raise _no_tangents(operator.name().removeprefix("memflow::"))

    forward.__signature__ = inspect.signature(forward)  # torch asks for it in every call
    parts = {"forward": forward, "setup_context": setup, "backward": backward, "jvp": jvp}
    members = {name: staticmethod(part) for name, part in parts.items()}
    return type(operator.name(), (torch.autograd.Function,), {**members, "generate_vmap_rule": True})


def _refused(name: str) -> tuple[Callable, Callable]:
    def backward(ctx, *grads):
        raise NotImplementedError(f"{name} has no derivative: memflow_kernels has first derivatives only")

    return (lambda ctx, inputs, output: None), backward


def derived(name: str, by: str | None = None) -> tuple[Callable, Callable]:
    """setup_context and backward by the operator `by`, default `<name>_backward`, which names what it needs. A gradient
    that nobody asks for is handed to it as None where its schema allows that, and as zeros elsewhere."""
    by = by or f"{name}_backward"
    forward, gradient = OPERATORS[name], OPERATORS[by]
    known = [*forward.arguments, *forward.results]
    needed = [x for x in gradient.arguments if x in known]
    tensors = [x for x in needed if "Tensor" in gradient.arguments[x]]
    others = [x for x in needed if x not in tensors]
    upstream = [f"grad_{x}" for x in forward.results]
    results = {f"grad_{x}": x for x in forward.results if f"grad_{x}" in gradient.arguments}
    optional = any("?" in gradient.arguments[x] for x in results)

    def setup(ctx, inputs, output):
        values = dict(zip(known, (*inputs, *(output if isinstance(output, tuple) else (output,))), strict=True))
        ctx.save_for_backward(*[values[x] for x in tensors])
        ctx.others = [values[x] for x in others]
        ctx.set_materialize_grads(not optional)

    def backward(ctx, *grads):
        values = dict(zip((*upstream, *tensors, *others), (*grads, *ctx.saved_tensors, *ctx.others), strict=True))
        for x, result in results.items():
            if values[x] is None and "?" not in gradient.arguments[x]:
                values[x] = torch.zeros_like(values[result])
        found = REGISTERED[by](*[values[x] for x in gradient.arguments])
        by_name = dict(zip(gradient.results, found, strict=True))
        return tuple([by_name.get(f"grad_{x}") for x in forward.arguments])

    return setup, backward
