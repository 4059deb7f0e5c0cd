"""Options that several commands have, and how they write their results."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer


def output(target: Any) -> Any:
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
    typer.Option("--json", help="Write JSON to this file; - is standard output.", callback=output),
]
Rows = Annotated[list[str] | None, typer.Argument(help="Rows (toy models); all when none is given.")]
LayoutOption = Annotated[str, typer.Option("--layout", help="e.g. tp2-pp2-ep2-sp")]
TrustOption = Annotated[
    bool | None,
    typer.Option("--trust-remote-code/--no-trust-remote-code", help="May code that the checkpoint ships run?"),
]

PluginOption = Annotated[
    list[str] | None,
    typer.Option("--plugin", help="A module or a Python file that registers bridges of yours; may be repeated."),
]
LossyOption = Annotated[bool, typer.Option("--lossy", help="Values may be rounded to a narrower dtype.")]
DtypeOption = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16: of the model in Megatron.")
]
FileDtypeOption = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16: of the exported tensors.")
]


def write_json(target: str | None, data: Any) -> None:
    if target == "-":
        print(json.dumps(data, indent=1))
    elif target:
        Path(target).write_text(json.dumps(data, indent=1) + "\n")


def words(values: list[str] | None) -> list[str]:
    """Options may be repeated or hold commas."""
    return [word for value in values or [] for word in value.split(",") if word]
