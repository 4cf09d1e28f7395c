"""Triton's interpreter made right for bfloat16 and twice as fast, for the tests alone.

It keeps bfloat16 as its bits: it cuts float32 off where a GPU rounds to nearest, which the error budgets count on, and
multiplies matrices of the bits themselves. And it prepares triton.language anew for every call of a device function,
where once per kernel is enough.
"""

import numpy as np
import torch


def repair() -> None:
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
    run_kernel = GridExecutor.__call__
    prepared = set()

    def cast_impl(self, source, target):
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)

    def create_dot(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (cast(self, x, tl.float32) for x in (a, b))
        return dot(self, a, b, *rest)

    def call_kernel(self, *args, **options):
        prepared.clear()
        return run_kernel(self, *args, **options)

    def call_device_function(self, *args, **options):
        names = self.fn.__globals__.values()
        languages = tuple(any(value is language for value in names) for language in (tl, tl.core))
        if languages not in prepared:
            interpreter._patch_lang(self.fn)
            prepared.add(languages)
        return self.rewrite()(*args, **options)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
    GridExecutor.__call__, InterpretedFunction.__call__ = call_kernel, call_device_function
