"""Pictures of a ledger: TFLOP/s per GPU by commit, and measured time against what the roofline predicts."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from harness.bench.ledger import LedgerError, Record, by_case, run_of

FORMATS = (".png", ".svg")


def runs(records: list[Record]) -> list[str]:
    """In the order of the ledger."""
    return list(dict.fromkeys(run_of(r) for r in records))


def _pyplot() -> Any:
    """matplotlib's drawing functions, without a screen. It is an extra: only pictures need it."""
    try:
        import matplotlib
    except ImportError:
        raise LedgerError("a picture needs matplotlib: pip install 'goldengate[bench]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot(records: list[Record], out: Path) -> None:
    """One page for one device. LedgerError for a file that is no .png or .svg, and where there is nothing to draw."""
    if out.suffix not in FORMATS:
        raise LedgerError(f"{out}: the picture is one of {', '.join(FORMATS)}")
    drawn = {case: lines for case, lines in by_case(records).items() if lines[0]["tflops"] is not None}
    if not drawn:
        raise LedgerError("no line has FLOPs: nothing to plot")
    plt = _pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(19, 7.5), constrained_layout=True, width_ratios=(3, 3, 4))
    colours = plt.get_cmap("tab20")
    style = {case: (colours(i // 2 % 20), "o" if i % 2 else "^") for i, case in enumerate(drawn)}
    order = runs(records)
    _over_runs(axes[0], {c: r for c, r in drawn.items() if not c.endswith(".train")}, order, style, "forward")
    _over_runs(axes[1], {c: r for c, r in drawn.items() if c.endswith(".train")}, order, style, "forward + backward")
    _against_prediction(axes[2], drawn, style)
    device = records[-1]["device"]["name"]
    peak = statistics.median(r["ceiling"]["flops_per_s"] for r in records) / 1e12
    processes = len({r["process"] for r in records})
    figure.suptitle(f"{device}: {processes} processes; a matrix product in the same runs reaches {peak:.4g} TFLOP/s")
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _over_runs(axis: Any, drawn: dict[str, list[Record]], order: list[str], style: dict, title: str) -> None:
    """A point a process, a line through the medians of the runs."""
    ends: dict[str, tuple[int, float]] = {}
    for case, records in drawn.items():
        colour, marker = style[case]
        places = [order.index(run_of(r)) for r in records]
        values = [r["tflops"] for r in records]
        axis.scatter(places, values, color=colour, marker=marker, s=14, alpha=0.5)
        middles = {p: statistics.median(v for q, v in zip(places, values, strict=True) if q == p) for p in set(places)}
        ordered = sorted(middles.items())
        axis.plot([p for p, _ in ordered], [v for _, v in ordered], color=colour)
        ends[case] = ordered[-1]
    axis.set_xticks(range(len(order)), order, rotation=30, ha="right", fontsize=8)
    axis.set_xlim(-0.5, 1.55 * len(order) - 1)  # names need a third of the width
    apart, lowest = 0.022 * max((r["tflops"] for records in drawn.values() for r in records), default=0), 0.0
    for case, (place, value) in sorted(ends.items(), key=lambda item: item[1][1]):
        lowest = max(value, lowest + apart)  # names do not lie on one another
        axis.annotate(
            case, (place, value), xytext=(place + 0.08, lowest), fontsize=7, va="center", color=style[case][0]
        )
    axis.set_ylim(bottom=0)
    axis.set_ylabel("TFLOP/s per GPU (hardware FLOPs)")
    axis.set_title(title)
    axis.grid(alpha=0.3)


def _against_prediction(axis: Any, drawn: dict[str, list[Record]], style: dict) -> None:
    """Medians over the processes of a case's last run; the bar goes from perfect overlap to none."""
    points = []
    for case, every in drawn.items():
        records = [r for r in every if run_of(r) == run_of(every[-1])]
        colour, marker = style[case]
        measured = 1e3 * statistics.median(r["median_s"] for r in records)
        low, high = (1e3 * statistics.median(r["roofline"][k] for r in records) for k in ("seconds", "serial_seconds"))
        points += [measured, low, high]
        axis.plot([low, high], [measured, measured], color=colour, linewidth=1)
        axis.plot(
            [low], [measured], color=colour, marker=marker, linestyle="none", label=f"{case}  {measured / low:.2f}x"
        )
    ends = (min(points) * 0.7, max(points) * 1.4)
    for factor, line in ((1, "-"), (1.25, "--"), (2, ":")):
        axis.plot(ends, [factor * e for e in ends], color="grey", linestyle=line, linewidth=0.8)
        axis.annotate(f"{factor:g}x", (ends[1], factor * ends[1]), fontsize=7, color="grey")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("predicted ms: the longer of FLOPs and bytes (marker) to their sum (end of the bar)")
    axis.set_ylabel("measured ms (median of processes)")
    axis.set_title("measured against roofline, in a case's last run")
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1), title="measured / predicted")
    axis.grid(alpha=0.3)
