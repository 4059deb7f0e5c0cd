"""`goldengate convert`: real checkpoints, in any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.commands.options import (
    DtypeOption,
    FileDtypeOption,
    JsonOption,
    LayoutOption,
    LossyOption,
    TrustOption,
    write_json,
)

app = typer.Typer(no_args_is_help=True, help="Real checkpoints, in any layout.")


@app.command("roundtrip")
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
    write_json(json_file, result)
    raise typer.Exit(1 if result["differences"] else 0)


@app.command("import")
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
    write_json(json_file, result)


@app.command("export")
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
    write_json(json_file, result)
