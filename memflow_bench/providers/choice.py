"""Which providers take part: by parts of their names, or a user's own, FILE.py:Name."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path

import torch

from memflow_kernels.backends import current_backend

from ..cases import is_line
from ..workloads import WORKLOADS
from . import PROVIDERS
from .base import Provider

ALL, OURS = "all", "ours"


def chosen_providers(wished: list[str] | None) -> list[Provider]:
    """Those wished for, each once, in the order of the wishes; every provider that there is where nothing is wished.

    Raises:
        ValueError: A wish that finds nobody; a file or class that cannot be used.
    """
    found: dict[str, Provider] = {}
    for wish in wished or [ALL]:
        if is_own(wish):
            provider = own_provider(wish)
            if provider.name in PROVIDERS or provider.name in found:
                raise ValueError(
                    f"--providers {wish}: there is a provider {provider.name!r} already; take another name"
                )
            found[provider.name] = provider
            continue
        named = {n: p for n, p in PROVIDERS.items() if wish == ALL or wish.lower() in n.lower()}
        if not named:
            raise ValueError(f"--providers {wish}: none of {', '.join(PROVIDERS)}; your own are named FILE.py:Name")
        found |= named
    return list(found.values())


def provider_named(name: str, device: torch.device) -> Provider:
    """One provider: "ours" (the backend that runs on `device`), a full name, or FILE.py:Name."""
    if name == OURS:
        name = f"ours ({current_backend(device)})"
    if is_own(name):
        return own_provider(name)
    if name not in PROVIDERS:
        raise ValueError(f"there is no provider {name!r}; providers: {', '.join(PROVIDERS)}, or FILE.py:Name")
    return PROVIDERS[name]


def is_own(wish: str) -> bool:
    return ".py:" in wish


def own_provider(spec: str) -> Provider:
    """The provider FILE.py:Name: a class, which is made without arguments, or an instance."""
    place, _, name = spec.rpartition(":")
    file = Path(place)
    if not file.is_file():
        raise ValueError(f"--providers {spec}: there is no file {place}")
    try:
        found = getattr(_module(file), name, None)
        provider = found() if isinstance(found, type) else found
    except (Exception, SystemExit) as error:
        raise ValueError(f"--providers {spec}: {file} cannot be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(provider, Provider):
        what = "no such name in it" if found is None else f"{name} is not a memflow_bench.providers.Provider"
        raise ValueError(f"--providers {spec}: {what}")
    label = getattr(provider, "name", None)
    if not is_line(label) or not label.strip():
        raise ValueError(f"--providers {spec}: {name} needs a `name`, the text of its row, in one line without |")
    if label.strip().lower().startswith(OURS):
        raise ValueError(
            f'--providers {spec}: {label!r}: a name that begins with "{OURS}" is that of a provider of this package'
        )
    if not any(hasattr(provider, workload) for workload in WORKLOADS):
        raise ValueError(f"--providers {spec}: {name} has no method named after a workload: {', '.join(WORKLOADS)}")
    return provider


def _module(file: Path):
    """Executed once, so that two classes of a file share it; what lies beside it can be imported, later too."""
    file = file.resolve()
    label = f"memflow_bench_own_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    if label not in sys.modules:
        if str(file.parent) not in sys.path:
            sys.path.append(str(file.parent))
        spec = importlib.util.spec_from_file_location(label, file)
        sys.modules[label] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[label]
            raise
    return sys.modules[label]
