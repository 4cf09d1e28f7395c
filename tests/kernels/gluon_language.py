"""Gluon's language on the CPU: what a kernel calls, by numpy, on the machine of gluon_machine.py.

Numbers are kept as float32 that their format could hold; every conversion rounds as torch does.
"""

from __future__ import annotations

import operator
from types import SimpleNamespace

import numpy as np
import torch
from gluon_machine import KERNEL, Barrier, Fault, Machine, Partition, Product, source_line


class Scalar(int):
    """A whole number in a kernel; `.to` is the only thing that int lacks."""

    def to(self, dtype):
        return self


for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor"):
    for _prefix in ("", "r"):
        _method = getattr(int, f"__{_prefix}{_name}__")

        def _closed(self, other, _method=_method):
            result = _method(self, other)
            return Scalar(result) if type(result) is int else result

        setattr(Scalar, f"__{_prefix}{_name}__", _closed)


class Tensor:
    """Numbers in registers."""

    def __init__(self, values, dtype=None):
        self.values = np.asarray(values)
        self.dtype = dtype or {"f": torch.float32, "i": torch.int32, "b": torch.bool}[self.values.dtype.kind]

    def to(self, dtype):
        if dtype.is_floating_point:
            values = np.asarray(self.values, np.float32)
            return Tensor(torch.from_numpy(values).to(dtype).float().numpy(), dtype)
        return Tensor(self.values.astype(np.int64), dtype)

    def __getitem__(self, index):
        return Tensor(self.values[index], self.dtype)

    def __neg__(self):
        return Tensor(-self.values)


def raw(x):
    """The numbers of anything that a kernel computes with."""
    return x.values if isinstance(x, Tensor) else x


def _binary(function):
    def compute(self, other):
        if isinstance(other, Pointer):
            return NotImplemented
        with np.errstate(all="ignore"):
            return Tensor(function(self.values, raw(other)))

    return compute


for _name in ("add", "sub", "mul", "truediv", "lt", "gt", "le", "ge", "eq", "and_", "or_"):
    _function = getattr(operator, _name)
    setattr(Tensor, f"__{_name.strip('_')}__", _binary(_function))
    if _name in ("add", "sub", "mul", "truediv"):
        setattr(Tensor, f"__r{_name}__", _binary(lambda a, b, _function=_function: _function(b, a)))


class Pointer:
    """Into a contiguous tensor; an address outside is a fault."""

    def __init__(self, tensor: torch.Tensor, offset=0):
        if not tensor.is_contiguous():
            raise Fault("a pointer to a tensor that is not contiguous")
        self.flat, self.offset = tensor.view(-1), offset
        self.dtype = SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, other):
        result = Pointer.__new__(Pointer)
        result.flat, result.dtype = self.flat, self.dtype
        result.offset = raw(self.offset) + raw(other)
        return result

    def places(self, mask, shape):
        """Where the mask lets through, and the addresses there."""
        offset, mask = np.broadcast_to(self.offset, shape), np.broadcast_to(raw(mask), shape)
        addresses = torch.from_numpy(np.array(offset[mask], np.int64))
        if addresses.numel() and not 0 <= int(addresses.min()) <= int(addresses.max()) < self.flat.numel():
            raise Fault(f"an address outside of a tensor of {self.flat.numel()} numbers")
        return mask, addresses


class Tile:
    """A view of shared memory."""

    def __init__(self, values: np.ndarray, dtype: torch.dtype):
        self.values, self.dtype = values, dtype

    def index(self, i):
        if not 0 <= i < len(self.values):
            raise Fault(f"stage {i} of {len(self.values)}")
        return Tile(self.values[int(i)], self.dtype)

    def reshape(self, shape):
        return Tile(self.values.reshape([int(n) for n in shape]), self.dtype)

    def permute(self, order):
        return Tile(self.values.transpose(order), self.dtype)


class Barriers:
    """An array of barriers in shared memory, called like the variable that it is put in."""

    def __init__(self, count: int):
        name = source_line(but_for=f"{KERNEL}names>")[1].partition("=")[0].strip()
        self.barriers = [Barrier(f"{name}[{i}]") for i in range(count)]

    def index(self, i):
        return self.barriers[int(i)]


class Descriptor:
    """A tensor described for bulk copies: 0 outside."""

    def __init__(self, described):
        base, self.block, self.layout = described.base, described.block_shape, described.layout
        strided = torch.as_strided(base, list(described.shape), list(described.strides), base.storage_offset())
        self.values, self.dtype = strided.float().numpy(), base.dtype

    def tile(self, at):
        if len(at) != len(self.block):
            raise Fault(f"{len(at)} coordinates for a descriptor of {len(self.block)} dimensions")
        tile, source, target = np.zeros(self.block, np.float32), [], []
        for first, length, size in zip(at, self.block, self.values.shape, strict=True):
            low, high = max(first, 0), max(min(first + length, size), max(first, 0))
            source.append(slice(low, high))
            target.append(slice(low - first, high - first))
        tile[tuple(target)] = self.values[tuple(source)]
        return tile


def load_tile(descriptor, at, barrier, tile):
    data = descriptor.tile(at)
    if data.shape != tile.values.shape:
        raise Fault(f"a tile of {data.shape} into {tile.values.shape}")
    Machine.current.copy(data, tile.values, barrier, data.size * descriptor.dtype.itemsize)


class Coming:
    """The result of a product in flight: no numbers before it has been waited for."""

    def __init__(self, product: Product):
        self.product = product


def warpgroup_mma(a, b, acc, *, use_acc=True, is_async=False):
    number, text = source_line()
    held = [(x.values, x.values.copy()) for x in (a, b) if isinstance(x, Tile)]
    if any(np.isnan(copy).any() for _, copy in held):
        raise Fault("a product reads shared memory in which nothing has arrived")
    if a.dtype != b.dtype:
        raise Fault(f"a product of {a.dtype} and {b.dtype}")
    value = (a.values @ b.values).astype(np.float32)
    product = Product(value + acc.values if use_acc else value, held, f"line {number}: {text}")
    Machine.current.me.products.append(product)
    Machine.current.history += [Machine.current.me.name] * is_async
    Machine.current.pause()
    return Coming(product) if is_async else warpgroup_mma_wait(0, [Coming(product)])


def warpgroup_mma_wait(most, deps):
    Machine.current.pause()
    flying = Machine.current.me.products
    while len(flying) > most:
        product = flying.pop(0)
        if any(not np.array_equal(now, then) for now, then in product.operands):
            raise Fault(f"an operand changed while its product was in flight: {product.line}")
    for x in deps:
        if any(x.product is product for product in flying):
            raise Fault(f"a product is used before it has been waited for: {x.product.line}")
    results = [Tensor(x.product.value) for x in deps]
    return results[0] if len(results) == 1 else tuple(results)


def allocate_shared_memory(dtype, shape, layout):
    if dtype == torch.int64:  # barriers, as triton/gluon/names.py makes them
        return Barriers(shape[0])
    return Tile(np.full([int(n) for n in shape], np.nan, np.float32), dtype)


def warp_specialize(functions_and_args, worker_num_warps, worker_num_regs):
    names = [f"{function.__name__} {i}" for i, (function, _) in enumerate(functions_and_args)]
    Machine.current.specialize(
        [
            Partition(name, lambda function=function, arguments=arguments: function(*arguments))
            for name, (function, arguments) in zip(names, functions_and_args, strict=True)
        ]
    )


def load(pointer, mask=True, other=0):
    shape = np.broadcast_shapes(np.shape(pointer.offset), np.shape(raw(mask)))
    mask, addresses = pointer.places(mask, shape)
    values = np.full(shape, other, np.float32 if pointer.flat.dtype.is_floating_point else np.int64)
    values[mask] = pointer.flat[addresses].numpy()
    return Tensor(values) if shape else Scalar(values)


def store(pointer, value, mask=True):
    shape = np.broadcast_shapes(np.shape(pointer.offset), np.shape(value.values))
    mask, addresses = pointer.places(mask, shape)
    values = np.broadcast_to(value.values, shape)[mask]
    pointer.flat[addresses] = torch.from_numpy(np.array(values)).to(pointer.flat.dtype)


def _function(function):
    def compute(*arguments):
        with np.errstate(all="ignore"):
            return Tensor(function(*(raw(x) for x in arguments)))

    return compute


def _choose(function):
    """Of numbers a number, of tensors a tensor."""

    def compute(*arguments):
        if any(isinstance(x, Tensor) for x in arguments):
            return _function(function)(*arguments)
        return Scalar(function(*arguments))

    return compute


def jit(function=None, **options):
    return function if function else jit


ignored = lambda *arguments, **options: None  # noqa: E731 - a layout, a fence
float32 = lambda x: np.asarray(x, np.float32)  # noqa: E731

language = SimpleNamespace(
    **{name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "int32", "int64")},
    **dict.fromkeys(("BlockedLayout", "SliceLayout", "NVMMADistributedLayout", "DotOperandLayout"), ignored),
    NVMMASharedLayout=ignored,
    constexpr=lambda x: x,
    static_range=range,
    cdiv=lambda a, b: Scalar(-(-a // b)),
    minimum=_choose(np.minimum),
    maximum=_choose(np.maximum),
    where=_choose(np.where),
    arange=lambda start, end, layout=None: Tensor(np.arange(start, end)),
    full=lambda shape, value, dtype, layout=None: Tensor(np.full(shape, value, np.float32), dtype),
    zeros=lambda shape, dtype, layout=None: Tensor(np.zeros(shape, np.float32), dtype),
    exp2=_function(lambda x: np.exp2(float32(x))),
    log2=_function(lambda x: np.log2(float32(x))),
    fma=_function(lambda a, b, c: float32(float32(a) * float32(b) + float32(c))),
    max=_choose(lambda x, axis: x.max(axis)),
    sum=lambda x, axis: Tensor(x.values.sum(axis)) if x.values.ndim > 1 else Scalar(x.values.sum()),
    convert_layout=lambda x, layout: x,
    load=load,
    store=store,
    allocate_shared_memory=allocate_shared_memory,
    warp_specialize=warp_specialize,
)  # fmt: skip
mbarrier = SimpleNamespace(
    MBarrierLayout=ignored,
    init=lambda barrier, count: barrier.init(count),
    expect=lambda barrier, size: barrier.arrive(1, size),
    arrive=lambda barrier, count=1: barrier.arrive(count),
    wait=lambda barrier, phase: barrier.wait(phase),
)
tma = SimpleNamespace(async_load=load_tile)
hopper = SimpleNamespace(
    mbarrier=mbarrier,
    tma=tma,
    warpgroup_mma=warpgroup_mma,
    warpgroup_mma_wait=warpgroup_mma_wait,
    fence_async_shared=ignored,
)
