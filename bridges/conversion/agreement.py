"""Ranks that tell each other something."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def of_all_ranks(value: Any) -> list[Any]:
    """What each rank gave, on every rank. Nobody goes on before all have come: a broadcast would let its source go on
    alone."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
