"""The Hugging Face side worked out from the Megatron side: which tensors a declaration asks for, and of which shape."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bridges.conversion.mapping import ParamMapping, Resolved
from bridges.conversion.plan import PlanError, Shape, symbol_sizes
from bridges.conversion.views import Expression, extents, parse, symbols_of


def tensors_of(
    name: str, mapping: ParamMapping, parts: Sequence[Resolved], provider: Any, size: int, local: Shape
) -> dict[str, Shape]:
    """{Hugging Face tensor: shape} of a parameter of which each of `size` ranks holds a block of shape `local`.

    PlanError when the declaration leaves more than one size open.
    """
    if parts[0].view is None:
        return {parts[0].hf: local}
    if mapping.side_by_side:
        local = (local[0] * len(parts), local[1] // len(parts))
    views = [parse(part.view) for part in parts if part.view]
    sizes: dict[str, int] = {**symbol_sizes(mapping, provider, name), "t": size}
    for view in views:
        if len(view.rest) == len(local) - 1:
            sizes = {**dict(zip(view.rest, local[1:], strict=True)), **sizes}
        sizes = {**dict.fromkeys(view.index, provider.num_moe_experts or 1), **sizes}
    free = sorted({s for view in views for s in symbols_of(view) if s not in sizes})
    if len(free) > 1:
        raise PlanError(f"{name}: the sizes of {', '.join(free)} cannot be told from Megatron's shape {local}")
    if free:
        at0, at1 = (_rows(views, {**sizes, free[0]: value}) for value in (0, 1))
        sizes[free[0]] = (local[0] * size - at0) // max(at1 - at0, 1)
    return {part.hf: extents(view, sizes) for part, view in zip(parts, views, strict=True)}


def _rows(views: Sequence[Expression], sizes: Mapping[str, int]) -> int:
    """Positions of the flattened (shard x feature) axis, over all parts."""
    return sum(math.prod(sizes[s] for s in (*view.shard, *view.feature)) for view in views)
