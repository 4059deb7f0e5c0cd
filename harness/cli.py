"""The `goldengate` command. Exit 0: all green, 1: a mismatch, 2: usage or bad input (one line says what)."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Proves that a bridge between Hugging Face and Megatron-Core is right.",
)
golden_app = typer.Typer(no_args_is_help=True, help="The stored reference values.")
convert_app = typer.Typer(no_args_is_help=True, help="Real checkpoints, in any layout.")
bench_app = typer.Typer(no_args_is_help=True, help="The ledger that pytest benchmarks --ledger writes.")
app.add_typer(golden_app, name="golden")
app.add_typer(convert_app, name="convert")
app.add_typer(bench_app, name="bench")


def _output(target: Any) -> Any:
    """An option that names an output: refused before the work starts when it could not be written after it."""
    if target and str(target) != "-":
        path = Path(target)
        if path.is_dir() or not path.parent.is_dir():
            why = f"{path} is a folder" if path.is_dir() else f"{path.parent} is not a folder: make it first"
            raise ValueError(f"cannot write {target}: {why}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ValueError(f"cannot write {target}: permission denied")
    return target


JsonOption = Annotated[
    str | None,
    typer.Option("--json", help="Write JSON to this file; - is standard output.", callback=_output),
]
Rows = Annotated[list[str] | None, typer.Argument(help="Rows (toy models); all when none is given.")]
LayoutOption = Annotated[str, typer.Option("--layout", help="e.g. tp2-pp2-ep2-sp")]
TrustOption = Annotated[
    bool | None,
    typer.Option("--trust-remote-code/--no-trust-remote-code", help="May code that the checkpoint ships run?"),
]

LossyOption = Annotated[bool, typer.Option("--lossy", help="Values may be rounded to a narrower dtype.")]
DtypeOption = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16: of the model in Megatron.")
]
FileDtypeOption = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16: of the exported tensors.")
]


def _write_json(target: str | None, data: Any) -> None:
    if target == "-":
        print(json.dumps(data, indent=1))
    elif target:
        Path(target).write_text(json.dumps(data, indent=1) + "\n")


def _words(values: list[str] | None) -> list[str]:
    """Options may be repeated or hold commas."""
    return [word for value in values or [] for word in value.split(",") if word]


@app.command()
def families(json_file: JsonOption = None) -> None:
    """The rows: model type, architecture, mechanisms, and the layouts each is proven in."""
    from rich.console import Console
    from rich.table import Table

    import toy_models
    from harness.reference import goldens
    from harness.sweep import describe, layouts_of

    rows = [
        {**describe(row, layouts_of(row, "full")), "golden": row in goldens.list_goldens()} for row in toy_models.rows()
    ]
    _write_json(json_file, rows)
    if json_file != "-":
        table = Table("row", "model type", "architecture", "mechanisms", "layouts", "golden", box=None)
        for r in rows:
            table.add_row(
                r["row"],
                r["model_type"],
                r["architecture"],
                ", ".join(r["mechanisms"]),
                str(len(r["layouts"])),
                "yes" if r["golden"] else "missing",
            )
        Console().print(table)


@app.command()
def verify(
    rows: Rows = None,
    layouts: Annotated[list[str] | None, typer.Option(help="quick, full, or layouts; commas or repeated.")] = None,
    checks: Annotated[
        list[str] | None,
        typer.Option(help="config, complete, roundtrip, logits, reload, grads (all by default), flops."),
    ] = None,
    json_file: JsonOption = None,
    html: Annotated[str | None, typer.Option(help="Write the report as one static page.", callback=_output)] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="That share the rows; as many as there are cores, up to 8, by default.")
    ] = None,
) -> None:
    """Check rows in layouts, on this machine, with Megatron-Core's own models and collectives."""
    from rich.console import Console

    import toy_models
    from harness import workers
    from harness.reference import goldens
    from harness.report.terminal import ProgressPrinter, print_table
    from harness.sweep import verify_rows

    chosen = rows or toy_models.rows()
    for row in chosen:
        toy_models.config_dict(row)  # an unknown row is named before anything runs
    if not rows:
        for name in goldens.orphans():
            raise ValueError(f"golden {name} has no row: delete goldens/{name}.safetensors or restore its row")
    with ProgressPrinter() as progress:
        report = verify_rows(
            chosen,
            which=_words(layouts) or "quick",
            checks=_words(checks) or None,
            started=progress.start,
            cell=progress.cell,
            processes=processes or workers.available(),
        )
    if json_file:
        report.save_json(json_file)
    if html:
        report.save_html(html)
    print_table(report, Console(stderr=json_file == "-"))
    raise typer.Exit(report.exit_code)


@app.command()
def flops(
    config: Annotated[
        str, typer.Argument(help="A row, a config.json, a folder with one, a hub id, or a folder of *.json.")
    ],
    seq: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 4096,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    packed: Annotated[
        str | None, typer.Option(help="Lengths of the documents packed into each sequence, by commas.")
    ] = None,
    convention: Annotated[str, typer.Option(help="model, causal or hardware; see docs/flops.md.")] = "causal",
    kernels: Annotated[
        str, typer.Option(help="Of the hardware convention: torch (this CPU) or fused (a GPU).")
    ] = "torch",
    trust_remote_code: TrustOption = None,
    json_file: JsonOption = None,
) -> None:
    """FLOPs of one forward and backward by named part, under a stated convention."""
    from rich.console import Console

    from harness.flops import command
    from harness.flops import flops as count
    from harness.quiet import quiet

    quiet()
    try:
        lengths = None if packed is None else [int(word) for word in packed.split(",")]
    except ValueError:
        raise ValueError(f"--packed {packed!r}: whole numbers separated by commas are needed, e.g. 1024,3072") from None
    run: dict = {"seq": seq, "batch": batch, "packed": lengths, "convention": convention, "kernels": kernels}
    if command.is_collection(config):
        found = command.survey(config, trust_remote_code, **run)
        _write_json(json_file, {"configs": [vars(one) for one in found]})
        if json_file != "-":
            Console().print(command.survey_table(found))
        return
    counted = count(command.load_provider(config, trust_remote_code), **run)
    _write_json(json_file, {"config": config, "description": command.describe(counted.run), **counted.as_dict()})
    if json_file != "-":
        Console().print(command.table(counted))


@app.command()
def plan(
    config: Annotated[str, typer.Argument(help="A row, a config.json, or a folder that holds one.")],
    layout: LayoutOption = "tp1",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the config's by default.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Prove by metadata that a model converts in a layout of any size: no weights, no ranks. Exit 1: not proven."""
    from harness import plan as planning
    from harness.quiet import quiet

    quiet()
    found = planning.plan(config, layout, dtype)
    _write_json(json_file, {"config": config, **found.as_dict()})
    if json_file != "-":
        print("\n".join(planning.lines(found)))
    raise typer.Exit(0 if found.coverage.ok else 1)


# -- golden ----------------------------------------------------------------------------------------------------------


@golden_app.command("regen")
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


@golden_app.command("diff")
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


@golden_app.command("list")
def golden_list(json_file: JsonOption = None) -> None:
    """Every golden with its gate, noise and versions; exit 1 for missing and orphaned ones."""
    from harness.reference import goldens

    rows = [
        {"row": row, **goldens.load(row).provenance} for row in goldens.list_goldens() if row not in goldens.orphans()
    ]
    _write_json(json_file, {"goldens": rows, "missing": goldens.missing(), "orphans": goldens.orphans()})
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


# -- convert ---------------------------------------------------------------------------------------------------------


@convert_app.command("roundtrip")
def convert_roundtrip(
    source: Annotated[Path, typer.Argument(help="A Hugging Face checkpoint folder.")],
    layout: LayoutOption = "tp1",
    target: Annotated[
        Path | None, typer.Option(help="Keep the exported folder here (default: a temporary one).")
    ] = None,
    trust_remote_code: TrustOption = None,
    dtype: DtypeOption = None,
    lossy: LossyOption = False,
    json_file: JsonOption = None,
) -> None:
    """Hugging Face -> Megatron in a layout -> Hugging Face, compared bit for bit."""
    from harness.convert import roundtrip

    result = roundtrip(source, layout, target, trust_remote_code, dtype=dtype, lossy=lossy)
    _write_json(json_file, result)
    raise typer.Exit(1 if result["differences"] else 0)


@convert_app.command("import")
def convert_import(
    source: Annotated[Path, typer.Argument(help="A Hugging Face checkpoint folder.")],
    target: Annotated[Path, typer.Argument(help="A new folder for the Megatron checkpoint.")],
    layout: LayoutOption = "tp1",
    trust_remote_code: TrustOption = None,
    dtype: DtypeOption = None,
    lossy: LossyOption = False,
    json_file: JsonOption = None,
) -> None:
    """Hugging Face -> a Megatron distributed checkpoint."""
    from harness.convert import import_checkpoint

    result = import_checkpoint(source, target, layout, trust_remote_code, dtype=dtype, lossy=lossy)
    _write_json(json_file, result)


@convert_app.command("export")
def convert_export(
    source: Annotated[
        Path, typer.Argument(help="A folder made by convert import (or Megatron's own torch_dist format).")
    ],
    target: Annotated[Path, typer.Argument(help="A new Hugging Face folder.")],
    reference: Annotated[
        Path | None,
        typer.Option("--hf", help="A Hugging Face folder of the model, where the checkpoint has none of it."),
    ] = None,
    layout: LayoutOption = "tp1",
    trust_remote_code: TrustOption = None,
    dtype: FileDtypeOption = None,
    lossy: LossyOption = False,
    json_file: JsonOption = None,
) -> None:
    """A Megatron distributed checkpoint -> Hugging Face."""
    from harness.convert import export_checkpoint

    result = export_checkpoint(source, target, reference, layout, trust_remote_code, dtype=dtype, lossy=lossy)
    _write_json(json_file, result)


# -- bench -----------------------------------------------------------------------------------------------------------

Selection = Annotated[
    str,
    typer.Argument(help="LEDGER.jsonl, or LEDGER.jsonl@WORD: a commit or a label. LEDGER.jsonl@LABEL@COMMIT: both."),
]


@bench_app.command("compare")
def bench_compare(a: Selection, b: Selection, json_file: JsonOption = None) -> None:
    """Is B faster or slower than A? By case, from replicated processes; exit 1 for slower, or when nothing compares."""
    from dataclasses import asdict

    from rich.console import Console

    from harness.bench import command, ledger, verdict

    verdicts = verdict.compare(ledger.select(a), ledger.select(b))
    _write_json(json_file, [asdict(v) for v in verdicts])
    if json_file != "-":
        Console().print(command.table(verdicts))
    raise typer.Exit(command.exit_code(verdicts))


@bench_app.command("plot")
def bench_plot(
    selection: Selection,
    out: Annotated[Path, typer.Option(help="The picture, .png or .svg.", callback=_output)],
) -> None:
    """TFLOP/s by commit or label, and measured time against predicted."""
    from harness.bench import ledger
    from harness.bench.plot import plot

    plot(ledger.select(selection), out)
    print(out)


def main() -> None:
    """Run the command; what a user did wrong is one line on stderr and exit code 2."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore")
    # Where a CUDA compiler is and no GPU, torch says so on import: no news, and not one line of ours.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        print(f"goldengate: {lines[0]}", file=sys.stderr)
        if os.environ.get("GOLDENGATE_DEBUG"):
            raise
        sys.exit(2)


if __name__ == "__main__":
    main()
