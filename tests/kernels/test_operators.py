"""The table of operators, and how they are registered: through torch's dispatcher, with derivatives or a refusal."""

import warnings
from contextlib import nullcontext

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import memflow_kernels
from memflow_kernels import (
    Pool,
    backends,
    frame_means,
    memory_attention,
    merge_attention,
    prompt_relevance,
    qk_norm_rope,
    replace_frame,
    rotate_keys,
    select_frames,
)
from memflow_kernels.cuda.coverage import LIMITS
from memflow_kernels.operators import OPERATORS, UNRECORDED
from memflow_kernels.ops import registration
from memflow_kernels.ops.registration import REGISTERED
from memflow_kernels.ops.relevance import AGGREGATES
from memflow_kernels.testing import states

KEY = states(2, 6, 3, 4)
WIDE = {"dtype": torch.float64}
ROTATED = {"weight_q": torch.ones(12, **WIDE), "weight_k": torch.ones(12, **WIDE), "eps": 1e-6, "grid": (1, 2)}
LSE = states(2, 3, 6, 1, seed=5, **WIDE)[..., 0]

# operator: a function of one tensor [2, 6, 3, 4] through its public name, differentiable in it
DIFFERENTIABLE = {
    "frame_means": lambda x: frame_means(x, 2),
    "memory_attention": lambda x: memory_attention(x, x, x, tokens_per_frame=2),
    "memory_attention_top_k": lambda x: memory_attention(x, x, x, tokens_per_frame=2, candidate_frames=3, top_k=2),
    "merge_attention": lambda x: merge_attention(x, LSE, 2 * x, LSE + 1)[0],
    "prompt_relevance_mean": lambda x: prompt_relevance(x, x, tokens_per_frame=2),
    "prompt_relevance_softmax": lambda x: prompt_relevance(x, x, tokens_per_frame=2, aggregate="softmax"),
    "prompt_relevance_token": lambda x: prompt_relevance(x, x, tokens_per_frame=2, aggregate="token"),
    "rotate_keys": lambda x: rotate_keys(x, torch.tensor([3, 1, -2]), tokens_per_frame=2),
    "qk_norm_rope": lambda x: torch.cat(qk_norm_rope(x, 2 * x, **ROTATED, start_frame=1)),
}


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Marked(torch.Tensor):
    """A subclass that adds nothing."""


def test_the_table_is_what_torch_has():
    """Public ops, registrations, compiled kernels and gradients all name what the table names."""
    assert set(REGISTERED) == set(OPERATORS)
    for name, operator in OPERATORS.items():
        schema = getattr(torch.ops.memflow, name).default._schema
        assert [x.name for x in schema.arguments] == list(operator.arguments)
    assert set(LIMITS) <= set(OPERATORS)
    gradients = {name for name in OPERATORS if name.endswith("_backward")}
    assert {name.removesuffix("_backward") for name in gradients} <= set(DIFFERENTIABLE)
    public = [name for name in memflow_kernels.__all__ if name in OPERATORS]
    assert set(OPERATORS) - gradients - set(public) == {
        "memory_attention_top_k",
        *(f"prompt_relevance_{aggregate}" for aggregate in AGGREGATES),
    }


def test_a_mode_sees_the_op():
    with Seen() as seen:
        frame_means(KEY, 2)
        with torch.inference_mode():
            frame_means(KEY, 2)
        frame_means(KEY.clone().requires_grad_(), 2)
    assert seen.names.count("memflow.frame_means_unrecorded.default") == 1  # nothing to record
    assert seen.names.count("memflow.frame_means.default") == 2


def test_what_autograd_need_not_record_is_the_same_op():
    for name, operator in REGISTERED.items():
        direct, other = operator.operator, getattr(torch.ops.memflow, name + UNRECORDED, None)
        assert (other is None) == ("!" in str(direct._schema)), name  # what is written to, autograd is told of
        if other is not None:
            assert str(other.default._schema).replace(UNRECORDED, "", 1) == str(direct._schema)
            assert torch._C._dispatch_has_kernel_for_dispatch_key(direct.name(), "Autograd")
            assert torch._C._dispatch_kernel_for_dispatch_key_is_fallthrough(other.default.name(), "Autograd")


def test_subclasses_and_transforms_see_the_op():
    assert type(frame_means(KEY.as_subclass(Marked), 2)) is Marked
    with torch._subclasses.FakeTensorMode() as mode:
        assert frame_means(mode.from_tensor(KEY), 2).shape == (2, 3, 3, 4)
    exported = torch.export.export(Means(), (KEY,))
    assert any("memflow.frame_means" in str(node.target) for node in exported.graph.nodes)


class Means(torch.nn.Module):
    def forward(self, key):
        return frame_means(key, 2)


def test_autograd_knows_what_a_kernel_wrote(monkeypatch):
    """A kernel writes behind autograd's back; a backward that needs the old content must raise."""
    slot, source = torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    pool = Pool.zeros(1, 2, 2, 1, 4)
    before = [part._version for part in pool]
    monkeypatch.setattr(backends, "implementation", lambda name, backend: lambda *arguments: None)
    for call in (
        lambda: replace_frame(pool, slot, source),
        lambda: torch.ops.memflow.replace_frame(*pool, slot, source),
    ):
        call()
        assert all(part._version > version for part, version in zip(pool, before, strict=True))
        before = [part._version for part in pool]
    with torch.inference_mode():
        replace_frame(Pool.zeros(1, 2, 2, 1, 4), slot, source)


def test_an_op_runs_on_the_device_of_its_tensors(monkeypatch):
    """Triton launches on the current device, whatever its arguments lie on."""
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    monkeypatch.setattr(backends, "implementation", lambda name, backend: lambda: "ran")
    monkeypatch.setattr(backends, "current_backend", lambda device, name=None: "triton")
    assert backends.dispatch("frame_means", torch.device("cuda", 0))() == "ran"
    assert entered == []
    assert backends.dispatch("frame_means", torch.device("cuda", 1))() == "ran"
    assert entered == [torch.device("cuda", 1)]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_forward_mode_is_refused_by_name(name):
    x, tangent = states(2, 6, 3, 4, **WIDE), torch.ones(2, 6, 3, 4, **WIDE)
    # these take means first, which are an op of their own
    refused = "frame_means" if name in ("prompt_relevance_mean", "prompt_relevance_token") else name
    with pytest.raises(NotImplementedError, match=f"^{refused} has no forward-mode derivative"):
        torch.func.jvp(DIFFERENTIABLE[name], (x,), (tangent,))
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match=f"^{refused} has no forward-mode derivative"),
    ):
        DIFFERENTIABLE[name](forward_ad.make_dual(x, tangent))


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("gradients", [torch.enable_grad, torch.no_grad])
def test_forward_mode_is_refused_whichever_argument_it_comes_by(place, gradients):
    states_ = [states(2, 6, 3, 4, seed=seed, **WIDE) for seed in range(3)]

    def attend(x):
        return memory_attention(*(x if i == place else y for i, y in enumerate(states_)), tokens_per_frame=2)

    with gradients(), pytest.raises(NotImplementedError, match="memory_attention has no forward-mode derivative"):
        torch.func.jvp(attend, (states_[place],), (torch.ones_like(states_[place]),))
    with (
        gradients(),
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="memory_attention has no forward-mode derivative"),
    ):
        attend(forward_ad.make_dual(states_[place], torch.ones_like(states_[place])))


def test_a_choice_of_frames_has_no_derivative_in_either_mode():
    x = states(2, 6, 3, 4, **WIDE)
    with forward_ad.dual_level():
        choice = select_frames(forward_ad.make_dual(x, torch.ones_like(x)), frame_means(x, 2), 2)
    assert torch.equal(choice, select_frames(x, frame_means(x, 2), 2))
    assert not select_frames(x.clone().requires_grad_(), frame_means(x, 2), 2).requires_grad


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_transforms_of_torch_func(name):
    """grad, vjp, jacrev, vmap(grad) and grad(vmap) give what autograd gives, also where only a captured tensor needs a
    gradient."""
    function = DIFFERENTIABLE[name]
    x = states(2, 6, 3, 4, **WIDE)
    leaf = x.clone().requires_grad_()
    weights = states(*(*function(x).shape, 1, 1)[:4], seed=3, **WIDE).reshape(function(x).shape)

    def loss(y):
        return (function(y) * weights).sum()

    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    torch.testing.assert_close(torch.func.vjp(function, x)[1](weights)[0], expected)
    rows = torch.func.jacrev(lambda y: function(y).flatten()[:3])(x)
    torch.testing.assert_close(rows.sum(0), torch.func.grad(lambda y: function(y).flatten()[:3].sum())(x))
    both = torch.vmap(torch.func.grad(loss))(torch.stack([x, x + 0.1]))
    torch.testing.assert_close(both[0], expected)
    pair = torch.stack([x, x + 0.1]).requires_grad_()
    total = lambda ys: torch.vmap(loss)(ys).sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(total)(pair.detach()), both)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*autograd kernel was not registered")
        torch.testing.assert_close(torch.autograd.grad(total(pair), pair)[0], both)
    captured = torch.func.grad(lambda scale: (function(leaf) * weights).sum() * scale)(torch.ones((), **WIDE))
    torch.testing.assert_close(captured, loss(x))


@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if f"{name}_backward" in OPERATORS])
def test_second_derivatives_are_refused_by_name(name):
    x = states(2, 6, 3, 4, **WIDE).requires_grad_()
    (grad,) = torch.autograd.grad(DIFFERENTIABLE[name](x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"^{name}_backward has no derivative"):
        grad.sum().backward()
    twice = torch.func.grad(lambda y: torch.func.grad(lambda z: DIFFERENTIABLE[name](z).square().sum())(y).sum())
    with pytest.raises(NotImplementedError, match=f"^{name}_backward has no derivative"):
        twice(x.detach())


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_by_torch_func(name):
    """Reverse over reverse where there are any; forward over reverse, torch.func.hessian, is refused by name."""
    x = states(2, 6, 3, 4, **WIDE)[:1, :2]
    loss = lambda y: DIFFERENTIABLE[name](y.expand(2, 2, 3, 4).repeat(1, 3, 1, 1)).square().sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match=r"^\w+ has no forward-mode derivative"):
        torch.func.hessian(loss)(x)
    twice = torch.func.jacrev(torch.func.jacrev(loss))
    if f"{name.removesuffix('_top_k')}_backward" in OPERATORS:
        with pytest.raises(NotImplementedError, match=r"^\w+_backward has no derivative"):
            twice(x)
    else:
        torch.testing.assert_close(twice(x), torch.autograd.functional.hessian(loss, x))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_compiled_call_has_the_same_gradient(name):
    x = states(2, 6, 3, 4, **WIDE).requires_grad_()
    compiled = torch.compile(DIFFERENTIABLE[name], fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(run(x).square().sum(), x)[0] for run in (DIFFERENTIABLE[name], compiled)]
    torch.testing.assert_close(*grads)


def test_a_direct_call_of_the_operator_has_the_same_gradient():
    x = states(2, 6, 3, 4, **WIDE).requires_grad_()
    out, _ = torch.ops.memflow.memory_attention(x, x, x, None, 2, 0, 0.5, None)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (out, memory_attention(x, x, x, tokens_per_frame=2))]
    torch.testing.assert_close(*grads)


def test_a_graph_captured_without_a_gradient_has_one_where_it_is_run(monkeypatch):
    """Kernels of GPUs leave nothing to autograd: what is captured must not rely on it."""
    dispatch = registration.dispatch
    detached = lambda x: x.detach() if isinstance(x, torch.Tensor) else x  # noqa: E731
    bare = lambda name, device: lambda *arguments: tree_map(detached, dispatch(name, device)(*arguments))  # noqa: E731
    monkeypatch.setattr(registration, "dispatch", bare)
    x = states(2, 6, 3, 4, **WIDE)
    captured = make_fx(DIFFERENTIABLE["memory_attention"])(x)
    assert "memory_attention_unrecorded" in captured.code
    x.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # autograd has nothing to say about an operator it does not know
        runs = (DIFFERENTIABLE["memory_attention"], captured)
        grads = [torch.autograd.grad(run(x).square().sum(), x)[0] for run in runs]
    torch.testing.assert_close(*grads)


def test_defaults_are_left_out_whoever_looks_on(monkeypatch):
    """Backends go by how many arguments there are."""
    reached, dispatch = [], registration.dispatch
    kernel = lambda name, device: lambda *arguments: (reached.append(arguments), dispatch(name, device)(*arguments))[1]  # noqa: E731
    monkeypatch.setattr(registration, "dispatch", kernel)
    query, weight = torch.randn(1, 6, 2, 8), torch.ones(16)
    place = {"weight_q": weight, "weight_k": weight, "eps": 1e-6, "grid": (2, 3), "start_frame": 1}
    for options in ({}, {"theta": 500.0}, {"axes": (2, 2, 4)}):
        reached.clear()
        direct = memflow_kernels.qk_norm_rope(query, query, **place, **options)
        with torch.profiler.profile() as seen:
            observed = memflow_kernels.qk_norm_rope(query, query, **place, **options)
        assert "memflow::qk_norm_rope_unrecorded" in {event.key for event in seen.key_averages()}
        assert [len(arguments) for arguments in reached] == [len(reached[0])] * 2
        assert all(torch.equal(a, b) for a, b in zip(direct, observed, strict=True))
    assert len(reached[0]) == 10  # of twelve: theta and per_head are left out
