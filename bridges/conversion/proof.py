"""The proof on the copies that nothing is lost: every element of both sides is counted. It needs names and shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from bridges.conversion.mapping import (
    EMBEDDING,
    OUTPUT,
    REPLICATED,
    MappingError,
    MegatronMappingRegistry,
    ParamMapping,
)
from bridges.conversion.plan import PlanError, Shape, Shard, copies, shard_of, symbol_sizes
from bridges.conversion.views import Box, fuse
from bridges.layout import Layout


@dataclass(frozen=True)
class Parameter:
    """A Megatron parameter or persistent buffer by its global name, with the whole model's shape (tp = etp = 1)."""

    name: str
    shape: Shape


@dataclass(frozen=True)
class Held:
    """A parameter or persistent buffer as one rank holds it: its global name, its shape there, and its bytes."""

    name: str
    shape: Shape
    nbytes: int = 0


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


def count_tensors(
    coverage: Coverage,
    hf_shapes: Mapping[str, Shape],
    by_hf: dict[str, list[Box]],
    repeated: Mapping[str, str] | None,
) -> None:
    """Add the Hugging Face side: every element in exactly one of the blocks that are read of its tensor."""
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
        if fault := fault_of(numel, tuple(by_hf[name]), False):
            coverage.errors.append(f"{name} {shape}: {fault}")


@lru_cache(maxsize=65536)
def fault_of(numel: int, boxes: tuple[Box, ...], gaps_allowed: bool) -> str | None:
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


def prove_ranks(
    holdings: Iterable[tuple[tuple[int, int], Sequence[Held]]],
    registry: MegatronMappingRegistry,
    hf_shapes: Mapping[str, Shape],
    provider: Any,
    layout: Layout,
    repeated: Mapping[str, str] | None = None,
) -> Coverage:
    """The proof for the union of all ranks of a replica: every element of every tensor in exactly one of them.

    `holdings` yields ((pipeline rank, expert rank), what it holds), as Megatron builds it, at one tensor rank: all tensor
    ranks hold the same names and shapes. Each shard of each parameter is planned for the shape that is really held, so a
    sharding that is declared and is not Megatron's does not fit. Never raises: whatever is wrong is in `errors`.
    """
    coverage = Coverage()
    census = Census(layout, provider.share_embeddings_and_output_weights)
    by_hf: dict[str, list[Box]] = {}
    for place, held in holdings:
        census.add(place, held)
    coverage.errors += census.faults()
    planner = _Planner(registry, hf_shapes, provider, layout)
    primary = census.primary
    for name, shape in census.shapes.items():
        try:
            found = planner.shards(name, shape, census.alias_of(name))
        except (PlanError, MappingError) as error:
            coverage.errors.append(str(error))
            continue
        if found.fault:
            coverage.errors.append(f"Megatron {name} {shape}: {found.fault}")
        if name not in primary:
            continue  # a second copy of another parameter, where the proof counts
        coverage.megatron_parameters += found.size
        coverage.megatron_elements += math.prod(shape) * found.size
        for hf, boxes in found.boxes:
            coverage.copies += len(boxes)
            by_hf.setdefault(hf, []).extend(boxes)
    count_tensors(coverage, hf_shapes, by_hf, repeated)
    return coverage


class Census:
    """Which places (pipeline rank, expert rank) hold which parameter: each one stage, each expert one expert rank."""

    def __init__(self, layout: Layout, tied: bool):
        self.layout, self.tied = layout, tied
        self.shapes: dict[str, Shape] = {}
        self.places: dict[str, list[tuple[int, int]]] = {}
        self._faults: list[str] = []

    def add(self, place: tuple[int, int], held: Sequence[Held]) -> None:
        for one in held:
            at = self.places.setdefault(one.name, [])
            if place in at:
                self._faults.append(f"stage {place[0]}, expert rank {place[1]} holds {one.name} twice")
            else:
                at.append(place)
            if self.shapes.setdefault(one.name, one.shape) != one.shape:
                self._faults.append(
                    f"{one.name} is {self.shapes[one.name]} at {at[0]} and {one.shape} at {place} (stage, expert rank)"
                )

    def alias_of(self, name: str) -> str | None:
        """The parameter whose mapping serves this one: the head of a tied model is its embedding once more."""
        return name.replace(OUTPUT, EMBEDDING) if self.tied and name.endswith(OUTPUT) else None

    @property
    def primary(self) -> frozenset[str]:
        """The parameters that are no second copy of another."""
        return frozenset(name for name in self.places if not self.alias_of(name))

    def faults(self) -> list[str]:
        found = list(self._faults)
        for name, places in self.places.items():
            stages, experts = sorted({pp for pp, _ in places}), {ep for _, ep in places}
            if name.endswith(EMBEDDING):  # the last stage may hold a second copy, for multi-token prediction
                if 0 not in stages:
                    found.append(f"{name} is not on stage 0")
            elif len(stages) > 1 and not self.alias_of(name):
                found.append(f"{name} is held by stages {', '.join(map(str, stages))}")
            if ".experts." in name:
                if len(experts) > 1:
                    found.append(f"{name} is held by expert ranks {', '.join(map(str, sorted(experts)))}")
            elif len(places) != len(stages) * self.layout.ep:
                found.append(f"{name} is on {len(places)} of {len(stages) * self.layout.ep} places of its stage")
        return found


@dataclass(frozen=True)
class _Shards:
    """All shards of one parameter: how many, {tensor: the blocks that they read}, what is wrong with them."""

    size: int
    boxes: tuple[tuple[str, tuple[Box, ...]], ...]
    fault: str | None


class _Planner:
    """Plans all shards of a parameter, once for all parameters that differ in their names alone."""

    def __init__(
        self, registry: MegatronMappingRegistry, hf_shapes: Mapping[str, Shape], provider: Any, layout: Layout
    ):
        self.registry, self.hf_shapes, self.provider, self.layout = registry, hf_shapes, provider, layout
        self._known: dict[Any, tuple[int, list[tuple[int, tuple[Box, ...]]], str | None]] = {}
        self._missing = 0

    def shards(self, name: str, shape: Shape, alias: str | None) -> _Shards:
        mapping, parts = self.registry.megatron_to_hf_lookup(alias or name)
        names = [part.hf for part in parts]
        for hf in names:
            if hf not in self.hf_shapes:
                self._missing += 1
                if self._missing > 3:  # the search for a near name takes its time
                    raise PlanError(f"{hf} is missing: Megatron's {name} is made of it")
        size = shard_of(mapping, self.layout, self.layout.coords(0)).size
        symbols = symbol_sizes(mapping, self.provider, name)
        key = (
            tuple((p.view, p.index, names.index(p.hf), self.hf_shapes.get(p.hf)) for p in parts),
            (shape, size, mapping.padded, mapping.side_by_side, mapping.padded and is_vocabulary(name)),
            tuple(sorted(symbols.items())),
        )
        if key not in self._known:
            by_part: dict[int, list[Box]] = {}
            faults, gaps = [], 0
            for rank in range(size):
                plan = copies(name, mapping, parts, self.hf_shapes, symbols, Shard(rank, size), shape)
                boxes = tuple(c.megatron_box for c in plan)
                gaps += math.prod(shape) - sum(box.numel for box in boxes)
                faults.append(fault_of(math.prod(shape), boxes, mapping.padded))
                for copy in plan:
                    by_part.setdefault(names.index(copy.hf), []).append(copy.hf_box)
            faults.append(self._padding_fault(name, shape, size, gaps) if mapping.padded else None)
            fault = next((fault for fault in faults if fault), None)
            self._known[key] = size, [(k, tuple(boxes)) for k, boxes in by_part.items()], fault
        size, blocks, fault = self._known[key]
        return _Shards(size, tuple((names[k], boxes) for k, boxes in blocks), fault)

    def _padding_fault(self, name: str, shape: Shape, size: int, gaps: int) -> str | None:
        """Padding is where the vocabulary is, and as much of it as the provider says."""
        if not is_vocabulary(name):
            return "declared as padded, but only the rows of a vocabulary are"
        rows, vocab = self.provider.padded_vocab_size, self.provider.vocab_size
        width = math.prod(shape[1:])
        if shape[0] * size != rows or gaps != (rows - vocab) * width:
            return f"{gaps} elements are padding; {vocab} tokens padded to {rows} rows leave {(rows - vocab) * width}"
        return None


def is_vocabulary(name: str) -> bool:
    """Are a Megatron parameter's rows the vocabulary's?"""
    return name.endswith((EMBEDDING, OUTPUT))


def local_shape(mapping: ParamMapping, shape: Shape, size: int) -> Shape:
    """A parameter's shape on one of `size` ranks. Vocabulary rows are padded up; anything else must divide."""
    if size == 1 or mapping.sharding == REPLICATED:
        return shape
    dim = 1 if mapping.sharding == "row" else 0
    if shape[dim] % size and not mapping.padded:
        raise PlanError(f"{mapping.megatron_param}: {shape[dim]} rows of {shape} cannot be divided by {size}")
    return tuple(-(-s // size) if d == dim else s for d, s in enumerate(shape))
