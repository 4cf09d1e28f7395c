"""What a suite runs."""

from __future__ import annotations

from .cases import Case, case, load_cases
from .experiments import PLAIN, AnyExperiment, Experiment, RealtimeExperiment, StreamExperiment

SUITES = ("quick", "kernels", "stream", "realtime", "training")
PUBLISHED = "published path"


def suite(name: str, device: str, backends: tuple[str, ...]) -> list[AnyExperiment]:
    """The experiments of a suite on a kind of device ("cpu" or "cuda"); `backends`: those of ours that can run.

    quick: everything at sizes that two CPU cores measure in minutes, the layer at full size. kernels: the ops at full
    size, every variant and sweep. stream: whole layers and streams; on a CPU of the reduced model. realtime: frames per
    second of loop and decoder, in every way that the loop can be run; on a CPU the reduced model, plainly. training:
    forward and backward beside torch's attention and FlexAttention, dense, activated and under a block-causal mask.
    """
    if name not in SUITES:
        raise ValueError(f"there is no suite {name!r}; suites: {', '.join(SUITES)}")
    makers = {"quick": quick, "kernels": kernels, "stream": streams, "realtime": realtime, "training": training}
    return makers[name](device == "cuda", backends)


OPS = ("attention", "means", "write", "update", "layer")  # what a case of one's own is measured with


def own(cases: dict[str, Case], workloads: list[str] | None, dtypes: list[str] | None, device: str) -> list[Experiment]:
    """Every workload on a user's cases, and on the cases of the package that theirs are swept from."""
    known = load_cases()
    bases = {c.like: known[c.like] for c in cases.values() if c.sweep and c.like not in cases}
    half = ["bfloat16"] if device == "cuda" else ["float32"]
    return [
        Experiment(workload, entry, dtype, budget=10)
        for entry in (*bases.values(), *cases.values())
        for workload in workloads or OPS
        for dtype in dtypes or half
    ]


def of(sweep: str, like: str) -> list[str]:
    return [name for name, entry in load_cases().items() if entry.sweep == sweep and entry.like == like]


def quick(gpu: bool, backends: tuple[str, ...]) -> list[Experiment | StreamExperiment]:
    full, small, toy = case("wan-1.3b-480p"), case("quarter"), case("toy")
    ours = tuple(f"ours ({backend})" for backend in backends)
    layers = [Experiment("layer", full, "float32", budget=30, least=2)]  # bfloat16: suite stream
    ops = [
        Experiment("update", full, "float32", budget=6),
        *(Experiment(op, full, dtype, budget=2) for op in ("write", "means") for dtype in ("float32", "bfloat16")),
        Experiment("attention", small, "float32", budget=10),
        # Without FlexAttention, which would be compiled twice more.
        Experiment("attention", small, "bfloat16", budget=10, only=(*ours, "SDPA flash", "SDPA math", PUBLISHED)),
        *(
            Experiment("attention", case(name), "float32", budget=4, only=(*ours, "SDPA flash", PUBLISHED))
            for name in of("memory", "quarter")
        ),
        Experiment("chunk", small, "float32", budget=8),
    ]
    stories = [
        StreamExperiment(toy, backends=backends, budget=45),
        StreamExperiment(small, backends=backends, budget=8),
    ]
    return [*layers, *ops, *stories]


def kernels(gpu: bool, backends: tuple[str, ...]) -> list[Experiment]:
    base = "wan-1.3b-480p"
    swept = [name for sweep in ("memory", "window", "top_k", "resolution", "streams") for name in of(sweep, base)]
    names = [base, *swept, "wan-14b-480p"] if gpu else [base]
    found = [Experiment("attention", case(name), "bfloat16", budget=4 if gpu else 120) for name in names]
    found += [Experiment("attention", case(base), dtype, budget=4 if gpu else 120) for dtype in ("float16", "float32")]
    dtypes = ("bfloat16", "float32")
    found += [Experiment(op, case(base), dtype, budget=3) for op in ("write", "means") for dtype in dtypes]
    return [*found, Experiment("update", case(base), "bfloat16" if gpu else "float32", budget=5)]


def streams(gpu: bool, backends: tuple[str, ...]) -> list[Experiment | StreamExperiment]:
    if not gpu:
        small = case("quarter")
        dtypes, ours = ("float32", "bfloat16"), tuple(f"ours ({backend})" for backend in backends)
        whole = [Experiment("layer", case("wan-1.3b-480p"), dtype, budget=150) for dtype in dtypes]
        whole += [Experiment("layer", case("wan-1.3b-480p-rows"), "float32", budget=90, only=ours)]
        told = [StreamExperiment(case("toy"), budget=60), StreamExperiment(small, without_memory=True, budget=60)]
        return [*whole, Experiment("chunk", small, "float32", budget=30), *told]
    base = case("wan-1.3b-480p")
    return [
        *(Experiment(workload, base, "bfloat16", budget=10) for workload in ("layer", "chunk")),
        StreamExperiment(base, "bfloat16", backends, without_memory=True, budget=60),
        StreamExperiment(case("toy"), backends=backends, budget=15),
    ]


def realtime(gpu: bool, backends: tuple[str, ...]) -> list[RealtimeExperiment]:
    if gpu:
        return [RealtimeExperiment(case("wan-1.3b-480p"))]
    small = {"base_dim": 8, "z_dim": 16, "num_res_blocks": 1}
    return [RealtimeExperiment(case("quarter"), "float32", (PLAIN,), vae=small, least=2)]


def training(gpu: bool, backends: tuple[str, ...]) -> list[Experiment]:
    base, tiny = case("wan-1.3b-480p" if gpu else "quarter"), case("tiny")
    peers = (*(f"ours ({backend})" for backend in backends), "SDPA flash")
    kinds = [(workload, dtype) for workload in ("training", "backward") for dtype in ("float32", "bfloat16")]
    return [
        *(Experiment(workload, base, dtype, budget=25, only=peers) for workload, dtype in kinds),
        *(Experiment(workload, tiny, "float32", budget=3, only=peers) for workload in ("training", "attention")),
        *(
            Experiment(workload, base, "float32", budget=25, only=(*peers, "FlexAttention"))
            for workload in ("block_causal", "block_causal_step")
        ),
    ]
