"""From declarations to copies, and the proof on the copies that nothing is lost.

    copy: megatron box <-> hf box          direction chooses source and destination

Everything here is metadata: names, shapes, strides. It runs for a layout of thousands of ranks as it does for one, needs
no weights, no processes and no process group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from bridges.checkpoints.reader import nearest_names
from bridges.conversion.mapping import REPLICATED, MappingError, MegatronMappingRegistry, Resolved
from bridges.conversion.mapping import Mapping as ParamMapping
from bridges.conversion.views import Axis, Box, Pair, ViewError, bind, fuse, parse, slice_flat
from bridges.layout import Coords, Layout

Shape = tuple[int, ...]


class PlanError(ValueError):
    """A tensor that is missing, left over, or of the wrong shape: the message names it and what was expected."""


@dataclass(frozen=True)
class Copy:
    """A block that stands in both worlds: `hf_box` of HF tensor `hf`, `megatron_box` of this rank's `megatron`."""

    megatron: str
    megatron_box: Box
    hf: str
    hf_box: Box


@dataclass(frozen=True)
class Shard:
    """Which part of a parameter one rank holds: shard `rank` of `size`."""

    rank: int
    size: int


def shard_of(mapping: ParamMapping, layout: Layout, coords: Coords) -> Shard:
    if mapping.sharding == REPLICATED:
        return Shard(0, 1)
    return Shard(coords.etp, layout.expert_tp) if mapping.is_expert else Shard(coords.tp, layout.tp)


def copies(
    name: str,
    mapping: ParamMapping,
    parts: Sequence[Resolved],
    hf_shapes: Mapping[str, Shape],
    sizes: Mapping[str, int],
    shard: Shard,
    local_shape: Shape,
) -> list[Copy]:
    """The copies that make up one Megatron parameter on one rank.

    `sizes` binds the mapping's symbols (see `symbol_sizes`). Raises PlanError naming the tensors when a part is absent
    or when shapes do not agree.
    """
    shapes = []
    for part in parts:
        if part.hf not in hf_shapes:
            near = nearest_names(part.hf, hf_shapes)
            raise PlanError(
                f"{part.hf} is missing: Megatron's {name} is made of it"
                + (f" (the checkpoint has {near[0]})" if near else "")
            )
        shapes.append(tuple(hf_shapes[part.hf]))
    key = tuple((p.view, p.index) for p in parts)
    symbols = tuple(sorted({**sizes, "t": shard.size}.items()))
    try:
        if mapping.side_by_side:  # a row of several parts is, in memory, a row of each after the other
            rows, columns = local_shape
            local_shape = (rows * len(parts), columns // len(parts))
        boxes = _boxes(key, tuple(shapes), symbols, shard, tuple(local_shape), mapping.padded)
    except ViewError as error:
        wrong = parts if error.part is None else [parts[error.part]]
        raise PlanError(f"{' + '.join(dict.fromkeys(p.hf for p in wrong))} as Megatron's {name}: {error}") from None
    return [Copy(name, mbox, parts[p].hf, hbox) for p, mbox, hbox in boxes]


@lru_cache(maxsize=65536)
def _boxes(parts, shapes, symbols, shard, local_shape, padded) -> tuple[tuple[int, Box, Box], ...]:
    if parts[0][0] is None:
        if shapes[0] != local_shape:
            raise ViewError(f"shape {shapes[0]}; Megatron holds {local_shape} on every rank")
        box = Box(0, (math.prod(local_shape),), (1,))
        return ((0, box, box),)
    known = dict(symbols)
    bound = []
    for part, ((view, index), shape) in enumerate(zip(parts, shapes, strict=True)):
        try:
            bound.append(bind(parse(view), shape, {s: known[s] for s in known if s in _symbols(view)}, dict(index)))
        except ViewError as error:
            error.part = part
            raise
    rest = [size for size, _ in bound[0].rest]
    for other in bound[1:]:
        if [s for s, _ in other.rest] != rest or other.shard_size != bound[0].shard_size:
            raise ViewError(f"the parts do not fit each other: shapes {' and '.join(map(str, shapes))}")
    row = math.prod(rest)  # elements behind one position of the flattened (shard x feature) axis
    width = sum(b.feature_size for b in bound)
    total = bound[0].shard_size * width
    local = math.prod(local_shape) // row if row else 0
    expected = total // shard.size if not padded else local
    if (
        local_shape != (expected, *rest)
        or (not padded and expected * shard.size != total)
        or local * shard.size < total
    ):
        raise ViewError(
            f"{total} rows over {shard.size} ranks make {(total / shard.size):g} x {tuple(rest)} each; "
            f"Megatron holds {local_shape}"
        )
    low = min(shard.rank * local, total)
    high = min(low + local, total)
    out = []
    for p, part in enumerate(bound):
        start = sum(b.feature_size for b in bound[:p])
        shard_axes = _with_rows(part.shard, width * row)
        feature_axes = _with_rows(part.feature, row)
        rest_axes = _with_rows(part.rest, 1)
        for first, last, f0, f1 in _rows(low, high, width, start, part.feature_size):
            for s in slice_flat(shard_axes, first, last):
                for f in slice_flat(feature_axes, f0, f1):
                    pair = Pair(
                        part.offset + s.a + f.a, (start - low) * row + s.b + f.b, (*s.axes, *f.axes, *rest_axes)
                    )
                    hf_box, megatron_box = pair.boxes()
                    out.append((p, megatron_box, hf_box))
    return tuple(out)


def _with_rows(axes: Sequence[tuple[int, int]], unit: int) -> list[Axis]:
    """HF axes with the strides they have in Megatron: row-major, the last one `unit` elements apart."""
    return [(size, stride, unit * math.prod(n for n, _ in axes[k + 1 :])) for k, (size, stride) in enumerate(axes)]


def _rows(low: int, high: int, width: int, start: int, size: int):
    """Where the rows [low, high) of the flattened axis (shards of `width` features) meet the features
    [start, start + size): (first shard, last shard + 1, first feature, last feature + 1), whole shards joined."""
    if low >= high:
        return
    first, last = low // width, (high - 1) // width
    whole = []
    for s in dict.fromkeys((first, last)):
        f0 = max(low - s * width - start, 0)
        f1 = min(high - s * width - start, size)
        if (f0, f1) == (0, size):
            whole.append(s)
        elif f0 < f1:
            yield s, s + 1, f0, f1
    begin = first if first in whole else first + 1
    end = last + 1 if last in whole else last
    if begin < end:
        yield begin, end, 0, size


@lru_cache(maxsize=4096)
def _symbols(view: str) -> frozenset[str]:
    expression = parse(view)
    return frozenset(
        s
        for dim in expression.dims
        for item in dim
        for s in ((item,) if isinstance(item, str) else (s for o in item.options for s in o))
    )


def symbol_sizes(mapping: ParamMapping, provider) -> dict[str, int]:
    """The mapping's symbols as numbers, read from the provider's attributes."""
    return {s: v if isinstance(v, int) else getattr(provider, v) for s, v in mapping.sizes.items()}


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
