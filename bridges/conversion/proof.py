"""The proof on the copies that nothing is lost: every element of both sides is counted. It needs names and shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from bridges.conversion.mapping import REPLICATED, MappingError, MegatronMappingRegistry, ParamMapping
from bridges.conversion.plan import Copy, PlanError, Shape, Shard, copies, shard_of, symbol_sizes
from bridges.conversion.views import Box, fuse
from bridges.layout import Layout


@dataclass(frozen=True)
class Parameter:
    """A Megatron parameter or persistent buffer by its global name, with the whole model's shape (tp = etp = 1)."""

    name: str
    shape: Shape


@dataclass
class Coverage:
    """What the proof counted. `ok` when `errors` is empty and something was counted."""

    hf_tensors: int = 0
    hf_elements: int = 0
    megatron_parameters: int = 0
    megatron_elements: int = 0
    copies: int = 0
    errors: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.errors and self.hf_elements > 0


def prove(
    hf_shapes: Mapping[str, Shape],
    plans: Iterable[tuple[str, Shape, Sequence[Copy], bool]],
    repeated: Mapping[str, str] | None = None,
) -> Coverage:
    """Every HF element in exactly one shard, every Megatron element written exactly once.

    `plans` yields (parameter, local shape, copies, padded) for each distinct shard of each parameter (replicas once).
    `repeated` HF tensors are second copies of another one and go where it goes.
    """
    coverage = Coverage()
    by_hf: dict[str, list[Box]] = {}
    for name, shape, plan, padded in plans:
        coverage.megatron_parameters += 1
        coverage.megatron_elements += math.prod(shape)
        coverage.copies += len(plan)
        fault = _fault(math.prod(shape), tuple(c.megatron_box for c in plan), padded)
        if fault:
            coverage.errors.append(f"Megatron {name} {shape}: {fault}")
        for copy in plan:
            by_hf.setdefault(copy.hf, []).append(copy.hf_box)
    for name, source in (repeated or {}).items():
        if source in by_hf:
            by_hf.setdefault(name, by_hf[source])
    for name, shape in hf_shapes.items():
        numel = math.prod(shape)
        if name not in by_hf:
            coverage.errors.append(f"{name}: no Megatron parameter reads it")
            continue
        coverage.hf_tensors += 1
        coverage.hf_elements += numel
        if fault := _fault(numel, tuple(by_hf[name]), False):
            coverage.errors.append(f"{name} {shape}: {fault}")
    return coverage


@lru_cache(maxsize=65536)
def _fault(numel: int, boxes: tuple[Box, ...], gaps_allowed: bool) -> str | None:
    """None when the boxes cover `numel` elements exactly once; counted on the coarsest grid that all boxes share."""
    unit = numel
    runs = []
    for box in boxes:
        axes = [(n, t) for n, t, _ in fuse([(n, t, t) for n, t in zip(box.sizes, box.strides, strict=True)])]
        run, outer = (axes[-1][0], axes[:-1]) if axes[-1][1] == 1 else (1, axes)
        unit = math.gcd(unit, box.offset, run, *(stride for _, stride in outer))
        runs.append((box.offset, run, outer))
    if not numel or not boxes:
        return None if not numel or gaps_allowed else f"no element of {numel} is covered"
    counts = np.zeros(numel // unit, np.uint16)
    for offset, run, outer in runs:
        shape = (*(size for size, _ in outer), run // unit)
        strides = (*(stride // unit for _, stride in outer), 1)
        end = offset // unit + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if offset < 0 or end >= len(counts):
            return f"a copy reaches element {offset if offset < 0 else end * unit}, outside its {numel}"
        view = np.lib.stride_tricks.as_strided(
            counts[offset // unit :], shape, tuple(s * counts.itemsize for s in strides)
        )
        view += 1
    missing, twice = int((counts == 0).sum()) * unit, int((counts > 1).sum()) * unit
    if twice or (missing and not gaps_allowed):
        first = int(np.argmax((counts > 1) if twice else (counts == 0))) * unit
        return f"{missing} elements covered by nothing, {twice} more than once (first at {first})"
    return None


def prove_layout(
    parameters: Sequence[Parameter],
    registry: MegatronMappingRegistry,
    hf_shapes: Mapping[str, Shape],
    provider,
    layout: Layout,
    *,
    repeated: Mapping[str, str] | None = None,
    alias: Mapping[str, str] | None = None,
) -> Coverage:
    """The proof for a whole layout from shapes alone: each parameter is planned for each of its shards.

    `parameters` describe the model unsharded; `alias` names Megatron parameters that are second copies of another.
    """

    def plans():
        for parameter in parameters:
            if alias and parameter.name in alias:
                continue
            mapping, parts = registry.megatron_to_hf_lookup(parameter.name)
            size = shard_of(mapping, layout, layout.coords(0)).size
            shape = local_shape(mapping, parameter.shape, size)
            for rank in range(size):
                shard = Shard(rank, size)
                yield (
                    parameter.name,
                    shape,
                    copies(parameter.name, mapping, parts, hf_shapes, symbol_sizes(mapping, provider), shard, shape),
                    mapping.padded,
                )

    try:
        return prove(hf_shapes, plans(), repeated)
    except (PlanError, MappingError) as error:
        return Coverage(errors=[str(error)])


def local_shape(mapping: ParamMapping, shape: Shape, size: int) -> Shape:
    """A parameter's shape on one of `size` ranks. Vocabulary rows are padded up; anything else must divide."""
    if size == 1 or mapping.sharding == REPLICATED:
        return shape
    dim = 1 if mapping.sharding == "row" else 0
    if shape[dim] % size and not mapping.padded:
        raise PlanError(f"{mapping.megatron_param}: {shape[dim]} rows of {shape} cannot be divided by {size}")
    return tuple(-(-s // size) if d == dim else s for d, s in enumerate(shape))
