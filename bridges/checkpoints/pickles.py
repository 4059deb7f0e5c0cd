"""The one pickle that is read: `.metadata` of Megatron's distributed checkpoints, of which an allowlist says what it may hold."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch

from bridges.checkpoints.reader import CheckpointError, check_inside, check_regular

METADATA = ".metadata"
ALLOWED = {
    *(("torch.distributed.checkpoint.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
            *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
        )
    ),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
}


class _Unpickler(pickle.Unpickler):
    """Resolves plain data classes of torch's checkpoints alone; a pickle can name any function and have it called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which could run code")


def check_metadata(checkpoint: Path) -> None:
    """Raise CheckpointError for a checkpoint whose metadata is no plain description, or describes files elsewhere."""
    file = checkpoint / METADATA
    if not file.exists():
        return  # Megatron says in its words that this is no checkpoint
    for path in checkpoint.iterdir():
        check_inside(checkpoint, path.name)
        if not path.is_dir():
            check_regular(path)
    try:
        with open(file, "rb") as handle:
            metadata = _Unpickler(handle).load()
        stored = [info.relative_path for info in (metadata.storage_data or {}).values()]
        outside = [name for name in stored if PurePosixPath(name).name != name]
    except Exception as error:  # damaged pickles raise whatever their classes do
        why = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{file} cannot be used: {why}; get the checkpoint from where it was made") from error
    if outside:
        raise CheckpointError(f"{file} names {outside[0]!r}, which is no file of its folder")


@contextlib.contextmanager
def restricted() -> Iterator[None]:
    """Have torch read metadata with the allowlist, whatever became of the file since it was checked."""
    from torch.distributed.checkpoint import filesystem

    plain = filesystem.pickle

    def load(file: BinaryIO) -> Any:
        return _Unpickler(file).load()

    filesystem.pickle = SimpleNamespace(load=load, dump=plain.dump, dumps=plain.dumps)  # type: ignore[assignment]
    try:
        yield
    finally:
        filesystem.pickle = plain
