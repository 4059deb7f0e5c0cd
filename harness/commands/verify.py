"""`goldengate verify`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from harness.commands.options import JsonOption, PluginOption, TrustOption, output, words

SECONDS_A_CELL = 0.3  # of one core, about; for the estimate that is printed

Targets = Annotated[
    list[str] | None,
    typer.Argument(
        help="Rows, or models of yours: a config.json, a checkpoint folder, a hub id. By default rows that have every "
        "mechanism between them."
    ),
]


def verify(
    targets: Targets = None,
    every: Annotated[bool, typer.Option("--all", help="All rows.")] = False,
    layouts: Annotated[list[str] | None, typer.Option(help="quick, full, or layouts; commas or repeated.")] = None,
    checks: Annotated[
        list[str] | None,
        typer.Option(help="config, complete, roundtrip, logits, reload, grads (all by default), flops."),
    ] = None,
    json_file: JsonOption = None,
    html: Annotated[str | None, typer.Option(help="Write the report as one static page.", callback=output)] = None,
    keep: Annotated[
        str | None,
        typer.Option("--save-row", help="Keep the toys of your own models here, as rows with their goldens."),
    ] = None,
    plugin: PluginOption = None,
    trust_remote_code: TrustOption = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="That share the rows; as many as there are cores, up to 8, by default.")
    ] = None,
) -> None:
    """Check rows, or toys of your own models, in layouts, with Megatron-Core's own models and collectives."""
    import toy_models
    from harness import plugins, workers
    from harness import targets as given
    from harness.mechanisms import sample
    from harness.reference import goldens
    from harness.report.console import Console
    from harness.report.terminal import ProgressPrinter, print_table
    from harness.sweep import layouts_of, verify_rows
    from harness.targets import TargetError

    for one in plugin or ():
        plugins.load(one)
    if targets and every:
        raise TargetError("name targets or say --all, not both")
    if not targets:
        for name in goldens.orphans():
            raise TargetError(f"golden {name} has no row: delete goldens/{name}.safetensors or restore its row")
    ours = toy_models.further_rows()  # in a repository with rows of its own these are meant, and all of them
    every = every or bool(ours)
    names = targets or (ours or toy_models.rows() if every else sample(toy_models.rows()))
    chosen = [given.resolve(name, trust_remote_code=trust_remote_code) for name in names]
    which, processes = words(layouts) or "quick", processes or workers.available()
    with given.as_rows(chosen) as rows:
        if not targets:
            cells = sum(6 * len(layouts_of(row, which)) for row in rows)
            count = (
                f"all {len(rows)} rows"
                if every
                else f"{len(rows)} of {len(toy_models.rows())} rows, every mechanism among them"
            )
            about = cells * SECONDS_A_CELL / processes
            print(
                f"{count}; about {cells:,} cells, {about:.0f} s" + ("" if every else " (--all takes every row)"),
                file=sys.stderr,
            )
        for one in (one for one in chosen if one.toy is not None):
            print(one, file=sys.stderr)
        with ProgressPrinter() as progress:
            report = verify_rows(
                rows,
                which=which,
                checks=words(checks) or None,
                started=progress.start,
                cell=progress.cell,
                processes=processes,
            )
        for one in (one for one in chosen if keep and one.toy is not None):
            given.save_row(one, Path(str(keep)), goldens.to_bytes(goldens.live(one.row)))
    if json_file:
        report.save_json(json_file)
    if html:
        report.save_html(html)
    print_table(report, Console(stderr=json_file == "-"))
    raise typer.Exit(report.exit_code)
