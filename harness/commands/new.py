"""`goldengate new`: the beginning of a family."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.commands.options import JsonOption, TrustOption, write_json


def new(
    family: Annotated[str, typer.Argument(help="The name of the bridge's file and of the row, as in qwen3_moe.")],
    source: Annotated[
        str, typer.Option("--from", help="A config.json, a checkpoint folder, or a hub id in the cache.")
    ],
    bridges: Annotated[Path | None, typer.Option(help="The folder for the bridge.")] = None,
    rows: Annotated[Path | None, typer.Option(help="The folder for the row.")] = None,
    trust_remote_code: TrustOption = None,
    json_file: JsonOption = None,
) -> None:
    """Write a family's bridge table and toy row as far as files say, try them, and list what a person must still say."""
    from harness.newcomer.make import begin
    from harness.quiet import quiet

    quiet()
    at = folders()
    begun = begin(family, source, bridges or at[0], rows or at[1], trust_remote_code)
    write_json(
        json_file,
        {
            "bridge": str(begun.bridge_file),
            "row": str(begun.row_file),
            "nearest": begun.nearest,
            "open": begun.open,
        },
    )
    if json_file == "-":
        return
    print(f"bridge   {begun.bridge_file}\nrow      {begun.row_file}\nnearest  {begun.nearest}")
    print("\n".join(f"open     {line}" for line in begun.open) or "open     nothing that files could show")
    print(f"then     goldengate verify {begun.row_file} --plugin {begun.bridge_file} --layouts tp1,tp2-sp")
    print(f'and      goldengate golden regen {family} --reason "new family"')


def folders() -> tuple[Path, Path]:
    """Return where bridges and rows are: in the user's repository, in ours, or here."""
    from harness import project

    if (found := project.find()) and found.plugins and found.rows:
        plugin = found.plugins[0]
        file = Path(plugin) if plugin.endswith(".py") else Path(*plugin.split("."))
        return found.folder / file.parent, found.folder / found.rows[0]
    ours = Path("bridges/families"), Path("toy_models/rows")
    return ours if all(folder.is_dir() for folder in ours) else (Path(), Path("rows"))
