"""What each part of the Hopper forward is worth: `python tests/kernels/gluon_variants.py`.

Variants of the kernel's source, one change each, are timed on a Hopper; elsewhere they are compiled for one and their
loops are read. Triton must compile, not interpret. docs/kernels.md says what is expected of each.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import torch

from memflow_kernels.triton import configs
from memflow_kernels.triton.attention import planned
from memflow_kernels.triton.gluon import attention_sm90

TURN = "mbarrier.wait(my_turn, (unit - first & 1) ^ GROUP)"
WAIT_FOR_VALUES = "mbarrier.wait(v_loaded.index(stage), parity)"
WAIT_FOR_PRODUCT = "acc = warpgroup_mma_wait(0, deps=[acc_coming])"
STAGES = 3

# name -> (changes of the source, stages)
VARIANTS = {
    "as it is": ((), STAGES),
    "without turns": (((TURN, "pass"), ("mbarrier.arrive(their_turn)", "pass")), STAGES),
    "the wait for values behind that for the product": (
        (
            (
                f"{WAIT_FOR_VALUES}\n        {WAIT_FOR_PRODUCT}",
                f"{WAIT_FOR_PRODUCT}\n        {WAIT_FOR_VALUES}",
            ),
        ),
        STAGES,
    ),
    "2 stages": ((), 2),
}


def kernel_of(changes: tuple[tuple[str, str], ...], folder: Path):
    """The kernel with its source changed; Triton reads the source from a file."""
    text = Path(attention_sm90.__file__).read_text()
    for is_, becomes in changes:
        if text.count(is_) != 1:
            raise ValueError(f"attention_sm90.py has {text.count(is_)} times, not once: {is_}")
        text = text.replace(is_, becomes)
    path = folder / "attention_sm90.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(f"{attention_sm90.__package__}.variant", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.forward_sm90_kernel


def timed() -> str:
    """Milliseconds and TFLOP/s of 12 of 15 frames, 4680 queries and 12 heads of 128, on this GPU."""
    import triton

    from memflow_kernels import memory_attention
    from memflow_kernels.testing import states

    query, key, value = (
        states(1, tokens, 12, 128, dtype=torch.bfloat16, layout="heads_first", device="cuda", seed=tokens + seed)
        for seed, tokens in enumerate((4680, 23400, 23400))
    )
    table = torch.tensor([0, 2, 5], dtype=torch.int32, device="cuda").expand(1, 12, 3).contiguous()
    options = {"tokens_per_frame": 1560, "candidate_frames": 6, "frame_table": table}
    run = lambda: memory_attention(query, key, value, **options)  # noqa: E731
    milliseconds = triton.testing.do_bench(run, warmup=200, rep=1000, return_mode="median")
    return f"{milliseconds:.3f} ms, {4 * 4680 * 18720 * 128 * 12 / milliseconds / 1e9:.0f} TFLOP/s"


def compiled(folder: Path) -> str:
    """Resources and loops of the kernel as it is chosen now."""
    import gluon_compile
    import machine_code

    resources = gluon_compile.compile_all(folder, "bf16-128")["bf16-128"]
    code = machine_code.listing((folder / "bf16-128.cubin").read_bytes())
    lines = [str({name: resources[name] for name in ("registers", "spilled", "shared")})]
    for loop in machine_code.loops(code):
        reading = machine_code.read(loop)
        lines.append(f"{reading} {reading.faults()}")
    return "\n  ".join(lines)


def main() -> None:
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    for name, (changes, stages) in VARIANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            attention_sm90.forward_sm90_kernel = kernel_of(changes, Path(folder))
            configs.SPECIALISED["sm_90"] = {128: configs.Config({"BN": 128}, stages=stages)}
            planned.cache_clear()
            print(f"{name}: {timed() if hopper else compiled(Path(folder))}", flush=True)


if __name__ == "__main__":
    main()
