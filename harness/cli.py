"""The `goldengate` command. Exit 0: all green, 1: a mismatch, 2: usage or bad input (one line says what),
3: a bug of goldengate's own, with its traceback."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from importlib.metadata import version
from typing import Annotated

import typer

from bridges.errors import GoldengateError
from harness.commands import bench, convert, golden, inspect
from harness.commands.new import new
from harness.commands.options import JsonOption, LayoutOption, TrustOption, write_json
from harness.commands.verify import verify
from harness.processes import exit_on_signals
from harness.report.console import printable

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Proves that a bridge between Hugging Face and Megatron-Core is right.",
)
app.add_typer(golden.app, name="golden")
app.add_typer(convert.app, name="convert")
app.add_typer(bench.app, name="bench")
app.command("inspect")(inspect.inspect)
app.command()(new)
app.command()(verify)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"goldengate {version('goldengate')}")
        raise typer.Exit()


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Stacks of errors, those of ranks too (also: GOLDENGATE_DEBUG=1).")
    ] = False,
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    if debug:
        os.environ["GOLDENGATE_DEBUG"] = "1"
    # Bridges, rows and goldens of the repository that the command is run in, if its pyproject.toml names some.
    from harness import project

    if found := project.find():
        found.activate()


@app.command()
def families(json_file: JsonOption = None) -> None:
    """The rows: model type, architecture, mechanisms, and the layouts each is proven in."""
    from rich.table import Table

    import toy_models
    from harness.reference import goldens
    from harness.report.console import Console
    from harness.sweep import describe, layouts_of

    rows = [
        {**describe(row, layouts_of(row, "full")), "golden": row in goldens.list_goldens()} for row in toy_models.rows()
    ]
    write_json(json_file, rows)
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
    from harness.flops import command
    from harness.flops import flops as count
    from harness.quiet import quiet
    from harness.report.console import Console

    quiet()
    try:
        lengths = None if packed is None else [int(word) for word in packed.split(",")]
    except ValueError:
        raise ValueError(f"--packed {packed!r}: whole numbers separated by commas are needed, e.g. 1024,3072") from None
    run: dict = {"seq": seq, "batch": batch, "packed": lengths, "convention": convention, "kernels": kernels}
    if command.is_collection(config):
        found = command.survey(config, trust_remote_code, **run)
        write_json(json_file, {"configs": [vars(one) for one in found]})
        if json_file != "-":
            Console().print(command.survey_table(found))
        return
    counted = count(command.load_provider(config, trust_remote_code), **run)
    write_json(json_file, {"config": config, "description": command.describe(counted.run), **counted.as_dict()})
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
    write_json(json_file, {"config": config, **found.as_dict()})
    if json_file != "-":
        print("\n".join(map(printable, planning.lines(found))))
    raise typer.Exit(0 if found.coverage.ok else 1)


def main() -> None:
    """Run the command; what a user did wrong is one line on stderr and exit code 2."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Whether there is a GPU is asked before processes are forked: CUDA must not start because of that.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    warnings.filterwarnings("ignore")
    # Where a CUDA compiler is and no GPU, torch says so on import: no news, and not one line of ours.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    exit_on_signals()
    try:
        app()
    except (GoldengateError, ValueError, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if os.environ.get("GOLDENGATE_DEBUG"):
            traceback.print_exc()
            print(getattr(error, "stack", ""), file=sys.stderr)  # of the rank, where it was raised on one
        print(f"goldengate: {printable(lines[0])}", file=sys.stderr)
        sys.exit(2)
    except Exception:
        traceback.print_exc()
        print("goldengate: this is a bug of goldengate, not of its input", file=sys.stderr)
        sys.exit(3)


if __name__ == "__main__":
    main()
