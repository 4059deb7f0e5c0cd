"""Which layouts a row is checked in.

`quick` is a handful; `full` is a covering set: every pair of axis values that fits into `MAX_RANKS` occurs in some layout,
and the combinations that are known to break bridges are there by name.
"""

from __future__ import annotations

import functools
import itertools
import operator
import random
from collections.abc import Iterable
from functools import cache

from bridges import Layout, LayoutError

MAX_RANKS = 8
RESTARTS = 100  # a thousand find no smaller set

DENSE_AXES: dict[str, tuple] = {"tp": (1, 2, 4), "pp": (1, 2, 4), "vpp": (1, 2), "cp": (1, 2), "sp": (False, True)}
EXPERT_AXES: dict[str, tuple] = {**DENSE_AXES, "ep": (1, 2, 4), "etp": (1, 2)}

QUICK_DENSE = ("tp1", "tp2-sp", "pp2-vpp2", "cp2", "pp2-split3.5", "tp4")
QUICK_EXPERT = ("tp1", "tp2-sp", "pp2-vpp2", "cp2", "ep2", "tp2-ep2-etp1-sp", "tp4-ep2-etp2")

# More query-head shards than query groups (tp4), an uneven split, a tied head far from its embedding and on a virtual
# stage, and everything at once.
NASTY_DENSE = ("tp1", "tp4", "pp2-split3.5", "pp4-vpp2", "tp2-pp2-sp")
NASTY_EXPERT = (*NASTY_DENSE[:-1], "tp2-pp2-ep2-sp", "tp2-pp2-vpp2-ep2-etp1-cp2-sp")

# Heads of multi-token prediction on a stage of their own, and there on the last virtual one.
NASTY_HEADS = ("pp2-split8.0", "tp2-pp2-vpp2-split3.3.2.0-sp")

# One GPU, and what fits on two and four.
GPU_DENSE = ("tp1", "tp2-sp", "pp2-vpp2", "cp2", "tp2-pp2-sp")
GPU_EXPERT = (*GPU_DENSE, "ep2", "tp2-ep2-etp1-sp")


def choose(which: str | list[str] | tuple[str, ...], *, experts: bool, heads: bool = False) -> list[Layout]:
    """`quick`, `full`, `gpu`, or layouts by name, for a model with or without experts, with or without heads of
    multi-token prediction."""
    names = [which] if isinstance(which, str) else list(which)
    chosen: dict[Layout, None] = {}
    for name in names:
        if name == "quick":
            found = [Layout.parse(t) for t in (QUICK_EXPERT if experts else QUICK_DENSE)]
        elif name == "full":
            nasty = [Layout.parse(t) for t in (NASTY_EXPERT if experts else NASTY_DENSE)]
            found = [*covering(experts, tuple(nasty)), *(Layout.parse(t) for t in NASTY_HEADS if heads)]
        elif name == "gpu":
            found = [Layout.parse(t) for t in (GPU_EXPERT if experts else GPU_DENSE)]
        else:
            found = [Layout.parse(name)]
        chosen.update(dict.fromkeys(found))
    return list(chosen)


@cache
def covering(experts: bool, start: tuple[Layout, ...] = ()) -> tuple[Layout, ...]:
    """`start` and a cheap set of layouts that cover the pairs of axis values which `start` leaves.

    The best of many greedy choices that break ties at random, with a fixed seed: the fewest layouts, then the fewest ranks.
    """
    axes = EXPERT_AXES if experts else DENSE_AXES
    numbers: dict = {}  # of each pair: a set of pairs is then the bits of an integer

    def pairs(layout: Layout) -> int:
        values = [(axis, layout.expert_tp if axis == "etp" else getattr(layout, axis)) for axis in axes]
        return sum(1 << numbers.setdefault(pair, len(numbers)) for pair in itertools.combinations(values, 2))

    candidates = {}
    for values in itertools.product(*axes.values()):
        try:
            layout = Layout(**dict(zip(axes, values, strict=True)))
        except LayoutError:
            continue
        if layout.world_size <= MAX_RANKS:
            candidates[layout] = pairs(layout)
    needed = _union(candidates.values()) & ~_union(map(pairs, start))
    choice = random.Random(0)
    tries = (_greedy(candidates, needed, choice) for _ in range(RESTARTS))
    best = min(tries, key=lambda chosen: (len(chosen), sum(layout.world_size for layout in chosen)))
    return (*start, *best)


def _greedy(candidates: dict[Layout, int], todo: int, choice: random.Random) -> list[Layout]:
    chosen = []
    while todo:
        gains = {layout: (pairs & todo).bit_count() for layout, pairs in candidates.items()}
        most = max(gains.values())
        chosen.append(choice.choice([layout for layout, gain in gains.items() if gain == most]))
        todo &= ~candidates[chosen[-1]]
    return chosen


def _union(sets: Iterable[int]) -> int:
    return functools.reduce(operator.or_, sets, 0)
