"""Faster, slower, same or not comparable: from replicated processes, by an exact rank test and the measured spread.

The unit is the process: rounds inside one share its clocks, its memory layout and its luck. See docs/benchmarks.md.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from harness.bench.ledger import Record, by_case, run_of

PROCESSES = 5  # on each side; the smallest two-sided p of 5 against 5 is 2/252
SIGNIFICANT = 0.01
LEAST_CHANGE = 0.03  # smaller changes of the median are no news, whatever the test says

Outcome = Literal["faster", "slower", "same", "not comparable"]


@dataclass(frozen=True)
class Verdict:
    """`change`: of the median seconds, b against a, -0.1 is a tenth less. `spread`: of the wider side."""

    case: str
    outcome: Outcome
    reason: str
    a_seconds: float | None = None
    b_seconds: float | None = None
    change: float | None = None
    spread: float | None = None
    p: float | None = None


def rank_test(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of the Mann-Whitney test by all ways of dealing the ranks, ties with their mean rank: exact.

    The share of the C(n + m, n) choices of n ranks whose sum is at least as far from its mean as that of `a`.
    """
    if not a or not b:
        raise ValueError("the rank test needs values on both sides")
    if not all(map(math.isfinite, [*a, *b])):
        raise ValueError("the rank test needs finite values")
    ordered = sorted([*a, *b])
    count = Counter(ordered)
    ranks: dict[float, int] = {}
    before = 0
    for value in sorted(count):  # twice the mean rank is whole
        ranks[value] = 2 * before + count[value] + 1
        before += count[value]
    # ways[k][s]: choices of k ranks with the (doubled) sum s.
    ways: list[Counter[int]] = [Counter({0: 1})] + [Counter() for _ in a]
    for value in ordered:
        rank = ranks[value]
        for k in range(len(a), 0, -1):
            for total, many in ways[k - 1].items():
                ways[k][total + rank] += many
    mean = len(a) * (len(ordered) + 1)  # of the doubled sum
    distance = abs(sum(ranks[value] for value in a) - mean)
    every = math.comb(len(ordered), len(a))
    return sum(many for total, many in ways[len(a)].items() if abs(total - mean) >= distance) / every


def spread(values: Sequence[float]) -> float:
    """Distance of the quartiles over the median: one outlier of five does not move it."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


def judge(case: str, a: Sequence[Record], b: Sequence[Record]) -> Verdict:
    """`b` against `a`, all of one case. A side with lines that cannot be compared with one another has no verdict."""
    for name in ("device", "settings", "versions"):
        if why := _differs(name, [*a, *b]):
            return Verdict(case, "not comparable", why)
    for side in (a, b):
        if len(mixed := sorted({run_of(r) for r in side})) > 1:
            return Verdict(case, "not comparable", f"one side is {' and '.join(mixed)}: choose by FILE@LABEL@COMMIT")
    shared = {r["process"] for r in a} & {r["process"] for r in b}
    if shared:
        return Verdict(case, "not comparable", f"{len(shared)} processes are on both sides")
    if min(len(a), len(b)) < PROCESSES:
        found = f"{len(a)} and {len(b)}" if len(a) != len(b) else str(len(a))
        return Verdict(case, "not comparable", f"{found} processes, {PROCESSES} on each side are needed")
    seconds = [[float(r["median_s"]) for r in side] for side in (a, b)]
    before, after = map(statistics.median, seconds)
    change, width, p = after / before - 1, max(map(spread, seconds)), rank_test(*seconds)
    needed = max(width, LEAST_CHANGE)
    outcome: Outcome = "same"
    if p < SIGNIFICANT and abs(change) > needed:
        outcome = "slower" if change > 0 else "faster"
    reason = f"{change:+.1%}, p {p:.2g}, spread {width:.1%}, {len(a)} and {len(b)} processes"
    return Verdict(case, outcome, reason, before, after, change, width, p)


def _differs(name: str, records: Sequence[Record]) -> str | None:
    """Which entry of this field is not the same in all lines."""
    first = records[0][name]
    for other in records[1:]:
        for key in sorted({*first, *other[name]}):
            if first.get(key) != other[name].get(key):
                if name == "settings":
                    return f"other {key}" + (_config_difference(first, other[name]) if key == "config" else "")
                return f"{name} {key}: {first.get(key)} and {other[name].get(key)}"
    return None


def _config_difference(a: dict, b: dict) -> str:
    a, b = a.get("config") or {}, b.get("config") or {}
    key = next(k for k in sorted({*a, *b}) if a.get(k) != b.get(k))
    return f": {key} {a.get(key)} and {b.get(key)}"


def compare(a: Sequence[Record], b: Sequence[Record]) -> list[Verdict]:
    """A verdict for every case of either side."""
    ours, theirs = by_case(a), by_case(b)
    found = []
    for case in dict.fromkeys([*ours, *theirs]):
        if case in ours and case in theirs:
            found.append(judge(case, ours[case], theirs[case]))
        else:
            found.append(Verdict(case, "not comparable", f"only in {'A' if case in ours else 'B'}"))
    return found
