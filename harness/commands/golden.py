"""`goldengate golden`: the stored reference values."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from harness.commands.options import JsonOption, Rows, write_json

app = typer.Typer(no_args_is_help=True, help="The stored reference values.")


@app.command("regen")
def golden_regen(
    reason: Annotated[str, typer.Option(help="Why; kept in the golden's provenance.")],
    rows: Annotated[list[str] | None, typer.Argument(help="Rows whose golden is made anew.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All rows.")] = False,
) -> None:
    """Compute goldens from Hugging Face in fp32 and print how far they drift from the old ones."""
    from transformers.utils.logging import disable_progress_bar

    import toy_models
    from harness.reference import goldens

    if bool(rows) == every:
        raise ValueError("name the rows whose golden is to be made anew, or say --all")
    disable_progress_bar()
    for row in rows or toy_models.rows():
        print(goldens.regen(row, reason), flush=True)


@app.command("diff")
def golden_diff(rows: Rows = None) -> None:
    """What a regeneration would change; exit 1 when it would change logits by more than the row's gate."""
    from transformers.utils.logging import disable_progress_bar

    from harness.reference import goldens

    disable_progress_bar()
    drifted = False
    for row in rows or goldens.list_goldens():
        drift = goldens.diff(row)
        drifted |= drift.value is None or not drift.value <= goldens.load(row).gate
        print(drift)
    raise typer.Exit(1 if drifted else 0)


@app.command("list")
def golden_list(json_file: JsonOption = None) -> None:
    """Every golden with its gate, noise and versions; exit 1 for missing and orphaned ones."""
    from harness.reference import goldens

    rows = [
        {"row": row, **goldens.load(row).provenance} for row in goldens.list_goldens() if row not in goldens.orphans()
    ]
    write_json(json_file, {"goldens": rows, "missing": goldens.missing(), "orphans": goldens.orphans()})
    if json_file != "-":
        for r in rows:
            noise = ", ".join(f"{k} {v:.1e}" for k, v in r["noise"].items())
            print(
                f"{r['row']:24} gate {r['gate']:.1e}  noise {noise}  gradients: gate {r['gradient_gate']:.1e}  "
                f"noise {r['gradient_noise']:.1e}  torch {r['versions']['torch']}, "
                f"transformers {r['versions']['transformers']}  ({r['reason']})"
            )
        for kind in ("missing", "orphans"):
            for row in getattr(goldens, kind)():
                print(f"{kind}: {row}", file=sys.stderr)
    raise typer.Exit(1 if goldens.missing() or goldens.orphans() else 0)
