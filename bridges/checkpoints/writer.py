"""Write a Hugging Face checkpoint folder from many processes at once.

    writer = CheckpointWriter("out", {"model.safetensors": {"norm.weight": (torch.bfloat16, (4096,))}})
    if rank == 0:
        writer.create()
    barrier()
    writer.open()
    writer.view("norm.weight")[first:last].copy_(block)  # every rank its own block
    writer.flush()
    writer.close()
    barrier()
    if rank == 0:
        writer.commit({"config.json": json.dumps(config)})

Sizes and headers follow from names, dtypes and shapes alone, so the files are laid out first and filled in
place: no process holds more than its own blocks and none talks to another. Until `commit` a reader sees no
checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import mmap
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import torch

from bridges.checkpoints.ownership import Journal, clear, foreign, partial_name
from bridges.checkpoints.reader import (
    DTYPES,
    INDEX_FILE,
    MAX_HEADER_BYTES,
    SINGLE_FILE,
    CheckpointError,
    TensorInfo,
    map_file,
    tensor_over,
)

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PT_METADATA = {"format": "pt"}  # what save_pretrained writes

TensorPlans = Mapping[str, tuple[torch.dtype, Sequence[int]]]  # tensor name -> dtype, shape


class CheckpointWriter:
    """The plan of a folder, {file: {tensor name: (dtype, shape)}}; making one touches nothing on disk.

    Every process makes the same plan. `metadata` goes into every file. `index` says whether to write an
    index; None means unless model.safetensors is the only file. In a file, tensors go by falling element size
    and else as given, so that each is aligned to its elements. `tensors` says where each will lie,
    `total_bytes` what the safetensors files take on disk.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        files: Mapping[str, TensorPlans],
        *,
        metadata: Mapping[str, str] = PT_METADATA,
        index: bool | None = None,
    ):
        self.folder = Path(folder)
        self.tensors: dict[str, TensorInfo] = {}
        self._headers: dict[str, bytes] = {}  # with the 8 bytes of length
        self._sizes: dict[str, int] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self._journal: Journal | None = None  # of the process that called create()
        self._created: list[Path] = []  # for abort(), in order of creation
        if not files:
            raise CheckpointError(f"{self.folder}: no file to write")
        for file, tensors in files.items():
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(f"{self.folder}: {file!r} is not a plain name ending in .safetensors")
            self._plan_file(file, tensors, metadata)
        self.total_bytes = sum(self._sizes.values())
        needs_index = list(files) != [SINGLE_FILE]
        if needs_index and index is False:
            raise CheckpointError(f"{self.folder}: without an index the only file must be {SINGLE_FILE}")
        self.index = needs_index if index is None else index

    def _plan_file(self, file: str, tensors: TensorPlans, metadata: Mapping[str, str]) -> None:
        header: dict[str, dict] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
            if dtype not in DTYPE_NAMES:
                raise CheckpointError(f"{file}: {name!r} has dtype {dtype}; known are {' '.join(DTYPES)}")
            if name == "__metadata__":
                raise CheckpointError(f"{file}: no tensor can have the name {name!r}, safetensors keeps it")
            if name in self.tensors:
                raise CheckpointError(f"{file}: tensor {name!r} is already in {self.tensors[name].file}")
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            self.tensors[name] = TensorInfo(name, dtype, tuple(shape), file, start, end - start)
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        if len(text) > MAX_HEADER_BYTES:
            raise CheckpointError(f"{file} needs a header of {len(text)} bytes, over 100 MB: use more files")
        self._headers[file] = len(text).to_bytes(8, "little") + text
        data = len(self._headers[file])
        self._sizes[file] = data + end
        for name in tensors:
            info = self.tensors[name]
            self.tensors[name] = dataclasses.replace(info, offset=data + info.offset)

    def create(self) -> None:
        """Reserve every file at its full size under a temporary name and write the headers, in one process.

        Disk space is taken here: writing a mapped page that the disk has no room for kills the process.
        """
        folder = self.folder
        if not folder.parent.is_dir():
            raise CheckpointError(f"{folder.parent} is not a folder: make it before writing {folder.name}")
        if other := foreign(folder):
            raise CheckpointError(f"{folder} is not empty ({other[0]}): empty it or choose another folder")
        clear(folder)
        try:
            if not folder.is_dir():
                folder.mkdir()
                self._created.append(folder)
            self._journal = Journal(folder)
            self._journal.write(self._headers)
            for file, header in self._headers.items():
                with open(self._partial(file), "xb") as handle:
                    self._created.append(self._partial(file))
                    os.posix_fallocate(handle.fileno(), 0, self._sizes[file])
                    handle.write(header)
        except OSError as error:
            self.abort()
            free = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free
            why = f"{error.strerror}, {free} bytes are free; make room or choose another folder"
            raise CheckpointError(f"cannot reserve {self.total_bytes} bytes in {folder}: {why}") from error

    def open(self) -> None:
        """Map what `create` laid out, in every process that writes."""
        for file, header in self._headers.items():
            memory = map_file(self._partial(file), mmap.MAP_SHARED)
            if len(memory) != self._sizes[file] or memory[: len(header)] != header:
                raise CheckpointError(f"{self._partial(file)} was laid out by a plan that is not this one")
            self._maps[file] = memory

    def view(self, name: str) -> torch.Tensor:
        """The tensor in its file, contiguous and writable: what is written here is what the file holds."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder}: the plan has no tensor {name!r}")
        info = self.tensors[name]
        if info.file not in self._maps:
            raise CheckpointError(f"{self.folder}: open() it in this process before writing {name!r}")
        return tensor_over(self._maps[info.file], info)

    def flush(self) -> None:
        """Push what was written to the disk or, on a network file system, to the server."""
        for memory in self._maps.values():
            memory.flush()

    def close(self) -> None:
        """Let go of the files. A view still held writes to its file, even after `commit`: drop it."""
        self._maps.clear()

    def commit(self, extra_files: Mapping[str, str | bytes | Path]) -> None:
        """Give the files their names, once all processes have flushed; in the process that called `create`.

        Extra files (config.json, tokenizer, ...; contents, or the Path of a file to copy) come first, then the
        tensors, then the index: a crash at whatever moment leaves no folder that looks complete and is not.
        """
        for name in extra_files:
            plain = name == str(PurePosixPath(name)) and not name.startswith("/") and ".." not in name.split("/")
            if not plain or name in ("", ".", *self._headers, INDEX_FILE):
                raise CheckpointError(f"{self.folder}: {name!r} cannot be an extra file: use another name")
        self.close()
        try:
            if self._journal is not None:
                self._journal.write([*self._headers, *extra_files, INDEX_FILE])
            for file in self._headers:
                _sync(self._partial(file))
            for name, content in extra_files.items():
                self._write(name, content)
            for file in self._headers:
                self._rename(file)
            _sync(self.folder)
            if self.index:
                self._write(INDEX_FILE, self._index_text())
                _sync(self.folder)
        except OSError as error:
            why = f"{error.strerror} ({error.filename}); abort() removes what is there"
            raise CheckpointError(f"cannot complete {self.folder}: {why}") from error
        self._created.clear()
        self._release()

    def _release(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def abort(self) -> None:
        """Remove what this process created, the folder too if it made it. After `commit` it does nothing."""
        self.close()
        if self._journal is not None:
            self._created.append(self._journal.path)
        while self._created:
            path = self._created.pop()
            with contextlib.suppress(OSError):  # renamed meanwhile, or somebody else's file is in the folder
                path.rmdir() if path.is_dir() else path.unlink()
        if self._journal is not None:
            self._journal.close(remove=False)
            self._journal = None

    def _partial(self, file: str) -> Path:
        return self.folder / partial_name(file)

    def _index_text(self) -> str:
        """As transformers writes it; total_size counts the tensors' bytes without headers."""
        total = sum(info.nbytes for info in self.tensors.values())
        weight_map = {name: info.file for name, info in self.tensors.items()}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def _write(self, file: str, content: str | bytes | Path) -> None:
        self._make_folder(self._partial(file).parent)
        with open(self._partial(file), "xb") as handle:
            self._created.append(self._partial(file))
            if isinstance(content, Path):
                with open(content, "rb") as source:
                    shutil.copyfileobj(source, handle)
            else:
                handle.write(content.encode() if isinstance(content, str) else content)
        _sync(self._partial(file))
        self._rename(file)

    def _make_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            self._make_folder(folder.parent)
            folder.mkdir()
            self._created.append(folder)

    def _rename(self, file: str) -> None:
        os.replace(self._partial(file), self.folder / file)
        self._created.append(self.folder / file)


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
