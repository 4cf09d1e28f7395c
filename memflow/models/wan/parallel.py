"""One transformer computed by several processes: its tokens are split by diffusers' hooks for context parallelism.

diffusers' own `enable_parallelism` does not serve here: it splits keys inside its attention functions, which a memory's
processors do without, and splits what `rope` returns, which here is a call's `Pass`.
"""

from __future__ import annotations

from diffusers import ContextParallelConfig, WanTransformer3DModel
from diffusers.hooks.context_parallel import apply_context_parallel
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch.distributed.device_mesh import init_device_mesh

from memflow.models.wan.attention import install, uninstall
from memflow.parallel.ranks import Ranks, require_division

# The clean pass ends before proj_out by an exception; hooks of a call that is left so hold nothing.
_PLAN = {
    "blocks.0": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)},
    "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
}


def share(transformer: WanTransformer3DModel, ranks: Ranks) -> None:
    """Let all processes of `ranks` compute every call of `transformer` together, for good.

    Args:
        transformer: the same in all of them.
        ranks: at least two.

    Raises:
        MemFlowError: their number does not divide the heads.
    """
    require_division(ranks.size, transformer.config.num_attention_heads)
    config = ContextParallelConfig(ulysses_degree=ranks.size)
    mesh = init_device_mesh(transformer.device.type, config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    config.setup(ranks.rank, ranks.size, transformer.device, mesh)
    apply_context_parallel(transformer, config, _PLAN)
    uninstall(transformer)
    transformer.ranks = ranks
    install(transformer)
