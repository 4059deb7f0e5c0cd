"""A Megatron checkpoint's folder that says which model it is of: `convert import` writes it, `convert export` reads it.

folder/config.json, tokenizer, ...           the files that travel with the model
folder/iter_0000000/                         Megatron's own distributed checkpoint
folder/latest_checkpointed_iteration.txt     which of them Megatron-LM resumes from
folder/goldengate_outline.json               names, dtypes, shapes and files of the Hugging Face tensors, for the way back
folder/goldengate_digests.json               sizes and sha256 of all of these
folder/goldengate_ignored.safetensors        the tensors that Megatron has no place for, if there are any
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from safetensors.torch import save_file

from bridges.checkpoints.companions import companions
from bridges.checkpoints.ownership import JOURNAL
from bridges.checkpoints.reader import CONFIG_FILE, DTYPES, Checkpoint, CheckpointError, TensorInfo, read_json_object

ITERATION = "iter_0000000"
LATEST = "latest_checkpointed_iteration.txt"
OUTLINE, IGNORED = "goldengate_outline.json", "goldengate_ignored.safetensors"
DIGESTS = "goldengate_digests.json"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, eq=False, repr=False)
class Outline(Checkpoint):
    """A checkpoint's names, dtypes, shapes and files without its values, except those of ignored tensors."""

    ignored: dict[str, torch.Tensor]

    def view(self, name: str) -> torch.Tensor:
        """An ignored tensor. CheckpointError for others: their values are in Megatron's checkpoint."""
        if name in self.ignored:
            return self.ignored[name]
        raise CheckpointError(f"{self.path} holds {name} in Megatron's form only: export it, or give hf_path")


def write_identity(folder: Path, source: Checkpoint, ignored: Iterable[str]) -> None:
    """Put beside Megatron's checkpoint all that an export needs of its source but the weights."""
    for path, file in companions(source.path).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / path)
    outline = {
        "index": source.has_index,
        "files": {
            file: {
                "metadata": source.metadata[file],
                "tensors": {n: [_NAMES[source.tensors[n].dtype], list(source.tensors[n].shape)] for n in names},
            }
            for file, names in source.files.items()
        },
    }
    (folder / OUTLINE).write_text(json.dumps(outline) + "\n")
    if kept := {name: source.view(name).clone() for name in ignored}:
        save_file(kept, folder / IGNORED, {"format": "pt"})
    (folder / LATEST).write_text("0\n")


def write_digests(folder: Path) -> None:
    """Write sizes and digests of all files below the folder, once they are complete, for `check_digests`."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (JOURNAL, DIGESTS))
    said = {str(PurePosixPath(p.relative_to(folder))): [p.stat().st_size, _digest(p)] for p in files}
    (folder / DIGESTS).write_text(json.dumps(said, indent=1) + "\n")


def check_digests(folder: Path, checkpoint: Path) -> None:
    """Raise CheckpointError, naming all, for files of Megatron's `checkpoint` that are not what `write_digests` saw. Neither
    Megatron nor torch sums up what they store. Iterations that training added are not known here and pass."""
    if not (folder / DIGESTS).is_file():
        return
    said, wrong = read_json_object(folder / DIGESTS), []
    for name, entry in said.items():
        path = folder / name
        if not (path.is_relative_to(checkpoint) or name in (OUTLINE, IGNORED)) or ".." in PurePosixPath(name).parts:
            continue
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif not isinstance(entry, list) or entry != [path.stat().st_size, _digest(path)]:
            wrong.append(f"{name} has changed")
    if wrong:
        raise CheckpointError(
            f"{folder}: {', '.join(wrong)} since it was imported: import it again, or remove {DIGESTS} if the change is meant"
        )


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_source(path: str | os.PathLike) -> Checkpoint:
    """A Hugging Face checkpoint, or the outline of one that stands beside Megatron's."""
    folder = Path(path)
    return _open_outline(folder) if (folder / OUTLINE).is_file() else Checkpoint.open(folder)


def _open_outline(folder: Path) -> Outline:
    from safetensors.torch import load_file

    outline = read_json_object(folder / OUTLINE)
    try:
        tensors = {
            name: TensorInfo(name, DTYPES[dtype], tuple(shape), file, 0, 0)
            for file, said in outline["files"].items()
            for name, (dtype, shape) in said["tensors"].items()
        }
        tensors = {
            name: TensorInfo(name, i.dtype, i.shape, i.file, 0, torch.Size(i.shape).numel() * i.dtype.itemsize)
            for name, i in tensors.items()
        }
        files = {file: list(said["tensors"]) for file, said in outline["files"].items()}
        metadata = {file: dict(said["metadata"]) for file, said in outline["files"].items()}
        index = bool(outline["index"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / OUTLINE} is damaged ({error!r}): give the Hugging Face folder (--hf)"
        ) from None
    ignored = load_file(folder / IGNORED) if (folder / IGNORED).is_file() else {}
    return Outline(folder, read_json_object(folder / CONFIG_FILE), tensors, files, metadata, index, {}, ignored)


def locate(source: Path) -> tuple[Path, Path | None]:
    """(Megatron's distributed checkpoint, the folder that says of which model or None) of what a user named: an iter_*
    folder, or the parent of several, in which latest_checkpointed_iteration.txt chooses."""
    if not source.is_dir():
        raise CheckpointError(f"{source} is not a folder: give a Megatron checkpoint")
    checkpoint = source
    if (source / LATEST).is_file():
        word = (source / LATEST).read_text(errors="replace").strip()
        checkpoint = source / ("release" if word == "release" else f"iter_{int(word):07d}" if word.isdecimal() else "?")
        if not checkpoint.is_dir():
            raise CheckpointError(
                f"{source / LATEST} says {word[:40]!r}, and there is no such checkpoint: name a folder iter_*"
            )
    elif iterations := sorted(p.name for p in source.iterdir() if re.fullmatch(r"iter_\d+", p.name)):
        if len(iterations) > 1:
            raise CheckpointError(f"{source} holds {', '.join(iterations)}: name one of them")
        checkpoint = source / iterations[0]
    known = (folder for folder in (source, checkpoint.parent) if (folder / OUTLINE).is_file())
    return checkpoint, next(known, None)
