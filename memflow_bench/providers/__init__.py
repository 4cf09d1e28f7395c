"""Who is compared. One short class per provider; `docs/benchmarks.md` says how to add one."""

from memflow_kernels.backends import BACKENDS

from .base import Provider, needs_gpu, needs_half, not_installed
from .flex import Flex, FlexFlash
from .gather import keys_and_values
from .ours import Ours
from .peers import FLASH_ATTENTION, SDPA, FlashAttention, FlashInfer, Sdpa
from .published import PublishedPath

PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        *(Ours(backend) for backend in BACKENDS),
        *(Sdpa(backend) for backend in SDPA),
        Flex(),
        FlexFlash(),
        *(FlashAttention(version) for version in FLASH_ATTENTION),
        FlashInfer(),
        PublishedPath(),
    )
}

__all__ = ["PROVIDERS", "Provider", "keys_and_values", "needs_gpu", "needs_half", "not_installed"]
