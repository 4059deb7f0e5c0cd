"""The one rule by which a Hugging Face tensor becomes a block of a Megatron parameter.

An expression names the factors of the HF tensor's dims and orders them as shard ; feature ; rest:

    "(g n d) h -> g ; n d ; h"             q_proj: query groups are the shard axis, heads and channels the features
    "o (t i) -> t ; o ; i"                 a row-parallel weight: the tensor-parallel rank is a factor of the columns
    "([*g n d | g d | g d]) h -> ..."      a dim made of segments, one after the other; * marks the one that is meant
    "e (t f) h -> t ; f ; h"               a symbol missing on the right is an index: the expert number

Parsing gives a plain value, binding it to a shape gives offsets, sizes and strides; no data is touched here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from bridges.errors import GoldengateError


class ViewError(GoldengateError, ValueError):
    """An expression that cannot be read, or a tensor shape that does not fit it."""

    part: int | None = None  # which of a mapping's tensors, where there are several


@dataclass(frozen=True)
class Segments:
    """Consecutive stretches of a dim, each a product of symbols; `pick` is the one that is meant."""

    options: tuple[tuple[str, ...], ...]
    pick: int


@dataclass(frozen=True)
class Expression:
    text: str
    dims: tuple[tuple[str | Segments, ...], ...]
    shard: tuple[str, ...]
    feature: tuple[str, ...]
    rest: tuple[str, ...]

    @property
    def index(self) -> tuple[str, ...]:
        """Symbols that select one slice and so are not part of the block."""
        used = {*self.shard, *self.feature, *self.rest}
        return tuple(s for s in _kept_symbols(self.dims) if s not in used)


def _kept_symbols(dims) -> list[str]:
    return [
        s for dim in dims for item in dim for s in (item.options[item.pick] if isinstance(item, Segments) else (item,))
    ]


_TOKEN = re.compile(r"\s*([A-Za-z_]\w*|[()\[\]|*])")


@cache
def parse(text: str) -> Expression:
    """Read an expression; ViewError says what is wrong with it."""
    left, arrow, right = text.partition("->")
    groups = right.split(";")
    if not arrow or len(groups) != 3:
        raise ViewError(f"view {text!r}: write dims -> shard ; feature ; rest")
    tokens, at = [], 0
    left = left.rstrip()
    while at < len(left):
        if not (match := _TOKEN.match(left, at)):
            raise ViewError(f"view {text!r}: cannot read {left[at:]!r}")
        tokens.append(match[1])
        at = match.end()

    dims: list[tuple] = []
    stream = iter(tokens)
    for token in stream:
        if token in ")[]|*":
            raise ViewError(f"view {text!r}: unexpected {token!r} outside brackets")
        dims.append(tuple(_group(stream, text)) if token == "(" else (token,))
    kept = _kept_symbols(dims)
    shard, feature, rest = (tuple(g.split()) for g in groups)
    for symbol in (*shard, *feature, *rest):
        if symbol not in kept:
            raise ViewError(
                f"view {text!r}: {symbol!r} stands on the right but not in the part that is meant on the left"
            )
    if len(set(kept)) != len(kept) or len({*shard, *feature, *rest}) != len((*shard, *feature, *rest)):
        raise ViewError(f"view {text!r}: a symbol is used twice")
    return Expression(text, tuple(dims), shard, feature, rest)


def _group(stream: Iterator[str], text: str) -> Iterator[str | Segments]:
    for token in stream:
        if token == ")":
            return
        if token == "[":
            options, pick, current = [], None, []
            for inner in stream:
                if inner in "|]":
                    options.append(tuple(current))
                    current = []
                    if inner == "]":
                        break
                elif inner == "*" and pick is None:
                    pick = len(options)
                elif inner in "()[*":
                    raise ViewError(f"view {text!r}: unexpected {inner!r} in a segment")
                else:
                    current.append(inner)
            if pick is None or not all(options):
                raise ViewError(f"view {text!r}: mark one of the segments with *, as in [*g n d | g d]")
            yield Segments(tuple(options), pick)
        elif token in "(]|*":
            raise ViewError(f"view {text!r}: unexpected {token!r}")
        else:
            yield token
    raise ViewError(f"view {text!r}: a bracket is not closed")


@dataclass(frozen=True)
class Bound:
    """An expression on one shape: where the block starts and the (size, stride) of each of its axes, in elements."""

    offset: int
    shard: tuple[tuple[int, int], ...]
    feature: tuple[tuple[int, int], ...]
    rest: tuple[tuple[int, int], ...]
    sizes: tuple[tuple[str, int], ...]

    @property
    def shard_size(self) -> int:
        return math.prod(size for size, _ in self.shard)

    @property
    def feature_size(self) -> int:
        return math.prod(size for size, _ in self.feature)


def bind(expression: Expression, shape: Sequence[int], known: Mapping[str, int], index: Mapping[str, int]) -> Bound:
    """Lay the expression over a tensor of `shape`. Symbols absent from `known` are worked out from the shape.

    Raises ViewError naming the dim, its expected factors, and the multiple that it should be.
    """
    return _bind(expression, tuple(shape), tuple(sorted(known.items())), tuple(sorted(index.items())))


@lru_cache(maxsize=65536)
def _bind(expression, shape, known_items, index_items) -> Bound:
    known, index = dict(known_items), dict(index_items)
    if len(shape) != len(expression.dims):
        raise ViewError(f"shape {shape} has {len(shape)} dims; `{expression.text}` names {len(expression.dims)}")
    sizes = {s: known[s] for dim in expression.dims for s in _all_symbols(dim) if s in known}
    pending = list(range(len(shape)))
    while pending:
        progress = False
        for d in list(pending):
            unknown = {s for s in _all_symbols(expression.dims[d]) if s not in sizes}
            if len(unknown) > 1:
                continue
            for symbol in unknown:
                sizes[symbol] = _solve(expression, d, shape, sizes, symbol)
            if _extent(expression.dims[d], sizes) != shape[d]:
                raise _mismatch(expression, d, shape, sizes)
            pending.remove(d)
            progress = True
        if not progress:
            names = sorted({s for d in pending for s in _all_symbols(expression.dims[d]) if s not in sizes})
            raise ViewError(f"`{expression.text}`: the sizes of {', '.join(names)} cannot be told from shape {shape}")

    strides: dict[str, int] = {}
    offset, stride = 0, 1
    for dim in reversed(expression.dims):
        for item in reversed(dim):
            if isinstance(item, Segments):
                lengths = [math.prod(sizes[s] for s in option) for option in item.options]
                offset += stride * sum(lengths[: item.pick])
                inner = stride
                for symbol in reversed(item.options[item.pick]):
                    strides[symbol] = inner
                    inner *= sizes[symbol]
                stride *= sum(lengths)
            else:
                strides[item] = stride
                stride *= sizes[item]
    for symbol in expression.index:
        if symbol not in index:
            raise ViewError(f"`{expression.text}`: nothing says which {symbol!r} is meant")
        if not 0 <= index[symbol] < sizes[symbol]:
            raise ViewError(f"`{expression.text}`: {symbol}={index[symbol]} is outside the tensor's {sizes[symbol]}")
        offset += index[symbol] * strides[symbol]

    def axes(symbols):
        return tuple((sizes[s], strides[s]) for s in symbols)

    return Bound(
        offset, axes(expression.shard), axes(expression.feature), axes(expression.rest), tuple(sorted(sizes.items()))
    )


def _all_symbols(dim) -> list[str]:
    return [
        s for item in dim for s in ((s for o in item.options for s in o) if isinstance(item, Segments) else (item,))
    ]


def symbols_of(expression: Expression) -> list[str]:
    """Every symbol of an expression, of the segments that are not meant too."""
    return [s for dim in expression.dims for s in _all_symbols(dim)]


def extents(expression: Expression, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of the tensor that an expression describes, when every symbol has a size."""
    return tuple(_extent(dim, sizes) for dim in expression.dims)


def _extent(dim, sizes) -> int:
    return math.prod(
        sum(math.prod(sizes[s] for s in o) for o in item.options) if isinstance(item, Segments) else sizes[item]
        for item in dim
    )


def _solve(expression, d, shape, sizes, symbol) -> int:
    """The one unknown size of a dim: its extent is linear in it."""
    dim = expression.dims[d]
    at0, at1 = (_extent(dim, {**sizes, symbol: u}) for u in (0, 1))
    slope = at1 - at0
    value, left = divmod(shape[d] - at0, slope) if slope > 0 else (0, 1)
    if left or value < 1:
        raise _mismatch(expression, d, shape, sizes, multiple=slope)
    return value


def _mismatch(expression, d, shape, sizes, multiple=None) -> ViewError:
    dim = " ".join(
        str(i)
        if isinstance(i, str)
        else "[" + " | ".join(("*" if k == i.pick else "") + " ".join(o) for k, o in enumerate(i.options)) + "]"
        for i in expression.dims[d]
    )
    given = ", ".join(f"{s}={sizes[s]}" for s in dict.fromkeys(_all_symbols(expression.dims[d])) if s in sizes)
    want = f"a multiple of {multiple}" if multiple else str(_extent(expression.dims[d], sizes))
    return ViewError(f"shape {shape}: dim {d} has {shape[d]}; `({dim})` with {given or 'no factor known'} needs {want}")


@dataclass(frozen=True)
class Box:
    """A strided block of a contiguous tensor: offset, sizes and strides in elements (as in torch.as_strided)."""

    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


Axis = tuple[int, int, int]  # size, stride on side a, stride on side b


@dataclass(frozen=True)
class Pair:
    """The same block on two sides: one shape, two offsets, two sets of strides."""

    a: int
    b: int
    axes: tuple[Axis, ...]

    def boxes(self) -> tuple[Box, Box]:
        axes = fuse(self.axes)
        sizes = tuple(size for size, _, _ in axes)
        return Box(self.a, sizes, tuple(a for _, a, _ in axes)), Box(self.b, sizes, tuple(b for _, _, b in axes))


def slice_flat(axes: Sequence[Axis], low: int, high: int) -> list[Pair]:
    """The interval [low, high) of the flattened axes, as few strided blocks as it takes."""
    axes = fuse(axes)
    if low >= high:
        return []
    if (low, high) == (0, math.prod(size for size, _, _ in axes)):
        return [Pair(0, 0, axes)]
    (_, a, b), inner = axes[0], axes[1:]
    step = math.prod(size for size, _, _ in inner)

    def at(k: int, lo: int, hi: int) -> list[Pair]:
        return [Pair(k * a + p.a, k * b + p.b, p.axes) for p in slice_flat(inner, lo, hi)]

    (first, head), (last, tail) = divmod(low, step), divmod(high, step)
    if first == last:
        return at(first, head, tail)
    blocks = at(first, head, step) if head else []
    first += bool(head)
    if last > first:
        blocks.append(Pair(first * a, first * b, ((last - first, a, b), *inner)))
    return blocks + (at(last, 0, tail) if tail else [])


def fuse(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """Drop axes of size 1 and join neighbours that are contiguous on both sides."""
    fused: list[Axis] = []
    for size, a, b in axes:
        if size == 1:
            continue
        if fused and fused[-1][1:] == (size * a, size * b):
            fused[-1] = (fused[-1][0] * size, a, b)
        else:
            fused.append((size, a, b))
    return tuple(fused) or ((1, 1, 1),)
