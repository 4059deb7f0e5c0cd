"""From declarations to copies, and the proof on the copies that nothing is lost.

    copy: megatron box <-> hf box          direction chooses source and destination

Everything here is metadata: names, shapes, strides. It runs for a layout of thousands of ranks as it does for one, needs
no weights, no processes and no process group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from bridges.conversion.mapping import REPLICATED, ParamMapping, Resolved
from bridges.conversion.views import Axis, Box, Pair, ViewError, bind, parse, slice_flat
from bridges.conversion.walk import walk_of
from bridges.errors import GoldengateError, nearest_names
from bridges.layout import Coords, Layout

Shape = tuple[int, ...]


class PlanError(GoldengateError, ValueError):
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


def symbol_sizes(mapping: ParamMapping, provider, name: str) -> dict[str, int]:
    """Return the mapping's symbols as numbers for the parameter `name`: attributes of the provider, or of its layer where
    the provider has layers of different sizes (`size_in_layer(attribute, layer)`)."""
    layer = walk_of(provider).layer_of(name)
    in_layer = getattr(provider, "size_in_layer", None)

    def size(attribute: str) -> int:
        return getattr(provider, attribute) if in_layer is None or layer is None else in_layer(attribute, layer)

    return {symbol: v if isinstance(v, int) else size(v) for symbol, v in mapping.sizes.items()}
