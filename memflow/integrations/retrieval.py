"""The update of a published model's bank in place of its own: the same frames, without attention over all of them."""

from __future__ import annotations

from torch import nn


class BankUpdate:
    pass


def bank_updates(model: nn.Module) -> list[BankUpdate]:
    return []
