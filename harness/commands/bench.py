"""`goldengate bench`: the ledger of benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.commands.options import JsonOption, output, write_json

app = typer.Typer(no_args_is_help=True, help="The ledger that pytest benchmarks --ledger writes.")


Selection = Annotated[
    str,
    typer.Argument(help="LEDGER.jsonl, or LEDGER.jsonl@WORD: a commit or a label. LEDGER.jsonl@LABEL@COMMIT: both."),
]


@app.command("compare")
def bench_compare(a: Selection, b: Selection, json_file: JsonOption = None) -> None:
    """Is B faster or slower than A? By case, from replicated processes; exit 1 for slower, or when nothing compares."""
    from dataclasses import asdict

    from harness.bench import command, ledger, verdict
    from harness.report.console import Console

    verdicts = verdict.compare(ledger.select(a), ledger.select(b))
    write_json(json_file, [asdict(v) for v in verdicts])
    if json_file != "-":
        Console().print(command.table(verdicts))
    raise typer.Exit(command.exit_code(verdicts))


@app.command("plot")
def bench_plot(
    selection: Selection,
    out: Annotated[Path, typer.Option(help="The picture, .png or .svg.", callback=output)],
) -> None:
    """TFLOP/s by commit or label, and measured time against predicted."""
    from harness.bench import ledger
    from harness.bench.plot import plot

    plot(ledger.select(selection), out)
    print(out)
