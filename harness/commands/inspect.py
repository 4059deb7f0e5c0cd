"""`goldengate inspect`: what a model is, before anything is converted."""

from __future__ import annotations

from typing import Annotated

import typer

from harness.commands.options import JsonOption, TrustOption, write_json
from harness.report.console import printable


def inspect(
    target: Annotated[str, typer.Argument(help="A row, a config.json, a checkpoint folder, or a hub id in the cache.")],
    gpus: Annotated[int | None, typer.Option(min=1, help="List the layouts of this many GPUs that fit.")] = None,
    memory: Annotated[float | None, typer.Option(help="GiB of each GPU.")] = None,
    trust_remote_code: TrustOption = None,
    json_file: JsonOption = None,
) -> None:
    """What a model is, which bridge fits or is nearest, which fields nobody knows, how large it is, and where it fits."""
    from harness.inspection.inspect import inspect as look
    from harness.inspection.lines import lines
    from harness.quiet import quiet

    if (gpus is None) != (memory is None):
        raise ValueError(
            "--gpus and --memory belong together: how many GPUs, and GiB of each, e.g. --gpus 8 --memory 80"
        )
    quiet()
    found = look(target, trust_remote_code=trust_remote_code, gpus=gpus, memory=memory)
    write_json(json_file, found.as_dict())
    if json_file != "-":
        print("\n".join(map(printable, lines(found))))
