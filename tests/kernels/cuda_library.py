"""`python cuda_library.py LIBRARY` loads the compiled kernels into the torch of this Python and prints what it met.

It needs torch alone, so that any other installation can be asked as well. One JSON object: the versions, the schemas,
the architectures, what the CUDA runtime says, and the error of every wrong call.
"""

import json
import sys

import torch


def states(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def wrong_calls() -> dict:
    """name -> a call that must fail; tensors lie on the CPU, where nothing runs anyway."""
    ops = torch.ops.memflow_cuda
    x, means = states(1, 12, 2, 64), states(1, 3, 2, 64, dtype=torch.float32)
    scores, row = torch.zeros(1, 5, 3), torch.zeros(1, 3)
    table = torch.zeros(1, 2, 1, dtype=torch.int32)
    slots = torch.zeros(1, dtype=torch.int32)
    pool = (states(1, 24, 2, 64), states(1, 24, 2, 64), states(1, 2, 2, 64, dtype=torch.float32))
    weight = states(128)
    attend = lambda q=x, k=x, v=x, t=None, n=4, c=0, block=None: ops.memory_attention(q, k, v, t, n, c, 1.0, block)  # noqa: E731
    write = lambda q=x, rows=3, start=None, p=pool, s=slots, w=weight: ops.qk_norm_rope_write(  # noqa: E731
        q, x, x, w, weight, 1e-6, rows, 4, 0, start, *p, s, True
    )
    return {
        "on the CPU": lambda: ops.frame_means(x, 4),
        "tokens": lambda: ops.frame_means(x, 5),
        "tokens_per_frame": lambda: ops.frame_means(x, 0),
        "dimensions": lambda: ops.frame_means(x[0], 4),
        "dtype": lambda: ops.frame_means(x.double(), 4),
        "stride": lambda: ops.frame_means(states(1, 12, 64, 2).transpose(2, 3), 4),
        "attention on the CPU": lambda: attend(),
        "head size": lambda: attend(states(1, 12, 2, 96), states(1, 12, 2, 96), states(1, 12, 2, 96)),
        "float32": lambda: attend(x.float(), x.float(), x.float()),
        "key dtype": lambda: attend(k=x.half()),
        "value shape": lambda: attend(v=states(1, 8, 2, 64)),
        "table dtype": lambda: attend(t=table.long(), c=1),
        "table shape": lambda: attend(t=table[:, :1], c=1),
        "table of blocks": lambda: attend(t=table, c=1, block=5),
        "query_block": lambda: attend(block=0),
        "candidate_frames": lambda: attend(c=4),
        "mask dtype": lambda: ops.prompt_relevance_mean(x, means, torch.ones(1, 12), 1.0),
        "means dtype": lambda: ops.prompt_relevance_mean(x, means.half(), None, 1.0),
        "token mask shape": lambda: ops.prompt_relevance_token(x, means, torch.ones(1, 3, dtype=torch.bool), 1.0),
        "token means shape": lambda: ops.prompt_relevance_token(x, means[..., :32].contiguous(), None, 1.0),
        "scores": lambda: ops.cover_frames(scores[0], torch.ones(1, 5), 2, row),
        "scores dtype": lambda: ops.cover_frames(scores.double(), torch.ones(1, 5), 2, row),
        "weights": lambda: ops.cover_frames(scores, torch.ones(1, 3), 2, row),
        "prior dtype": lambda: ops.cover_frames(scores, torch.ones(1, 5), 2, row.half()),
        "k": lambda: ops.cover_frames(scores, torch.ones(1, 5), -1, row),
        "covering on the CPU": lambda: ops.cover_frames(scores, torch.ones(1, 5), 2, row),
        "key shape": lambda: ops.prompt_relevance_softmax(x, states(1, 12, 3, 64), None, 4, 1.0),
        "top_k": lambda: ops.select_frames(x, means, 0, None, None),
        "valid shape": lambda: ops.select_frames(x, means, 1, torch.ones(1, 2, dtype=torch.bool), None),
        "rows": lambda: write(rows=0),
        "slots": lambda: write(s=slots.long()),
        "weight": lambda: write(w=weight[:64]),
        "start": lambda: write(start=torch.zeros(2, dtype=torch.int32)),
        "pool of another frame size": lambda: write(rows=1),
        "write on the CPU": lambda: write(start=torch.zeros(1, dtype=torch.int64)),
        "slot shape": lambda: ops.replace_frame(*pool, table, slots),
        "pool": lambda: ops.replace_frame(pool[0], pool[1][:, :12], pool[2], slots, slots),
        "replacement on the CPU": lambda: ops.replace_frame(*pool, slots, slots),
        "gather on the CPU": lambda: ops.gather_frames(x, x, table, 4, 1),
    }


def met(library: str) -> dict:
    torch.ops.load_library(library)
    errors = {}
    for name, call in wrong_calls().items():
        try:
            call()
        except RuntimeError as error:
            errors[name] = str(error).splitlines()[0]
        else:
            errors[name] = None
    ops = torch.ops.memflow_cuda
    return {
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "schemas": sorted(str(schema) for schema in torch._C._jit_get_all_schemas() if "memflow_cuda::" in str(schema)),
        "architectures": ops.architectures(),
        "runtime_error": ops.runtime_error(),
        "errors": errors,
    }


if __name__ == "__main__":
    print(json.dumps(met(sys.argv[1]), indent=1))
