"""Read a Hugging Face checkpoint folder as views of its memory-mapped files.

    with Checkpoint.open("Qwen3-0.6B") as checkpoint:
        weight = checkpoint.view("model.embed_tokens.weight")  # nothing is read until somebody copies from it

The headers are parsed here and not by the safetensors library because import and export need exact byte
offsets. The parser is as strict as the library's, so a file that opens here loads there. What is wrong with a
folder is said before any weight is read. bridges/checkpoints/writer.py writes such folders.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from pathlib import Path, PurePath
from typing import Any

import torch

from bridges.errors import GoldengateError, nearest_names

CONFIG_FILE = "config.json"


SINGLE_FILE = "model.safetensors"


INDEX_FILE = "model.safetensors.index.json"


MAX_HEADER_BYTES = 100_000_000  # the safetensors library refuses more


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


INT_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# Without it Linux counts a private writable mapping as memory and refuses a file larger than RAM. Python has
# the name only since 3.13; the value is Linux's.
MAP_NORESERVE = 0x4000


class CheckpointError(GoldengateError, ValueError):
    """A checkpoint that cannot be read or written: one line that names the file or tensor and the way out."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `offset` is in bytes from the start of `file`, a name relative to the folder."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, eq=False, repr=False)
class Checkpoint:
    """A Hugging Face folder, read only. Files are in name order, tensors as they lie in their file.

    `config` is config.json as it stands, `metadata[file]` a file's `__metadata__`, {} if it has none. A file
    that the index does not name (Mistral's consolidated.safetensors, say) is no part of the checkpoint.
    """

    path: Path
    config: dict
    tensors: dict[str, TensorInfo]
    files: dict[str, list[str]]
    metadata: dict[str, dict[str, str]]
    has_index: bool
    _maps: dict[str, mmap.mmap]

    @classmethod
    def open(cls, path: str | os.PathLike) -> Checkpoint:
        """Map the files and check headers, sizes and index against each other. Reads no weights."""
        folder = Path(path)
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder: give one with {CONFIG_FILE} and safetensors")
        for file in (CONFIG_FILE, INDEX_FILE):
            check_inside(folder, file)
        config = read_json_object(folder / CONFIG_FILE)
        weight_map = _read_weight_map(folder)
        tensors, files, metadata, maps = {}, {}, {}, {}
        for file in [SINGLE_FILE] if weight_map is None else sorted(set(weight_map.values())):
            check_inside(folder, file)
            maps[file] = map_file(folder / file, mmap.MAP_PRIVATE | MAP_NORESERVE)
            found, metadata[file] = _parse_header(folder / file, file, maps[file])
            for info in found:
                if other := tensors.get(info.name):
                    both = f"{other.file} and {file}"
                    raise CheckpointError(f"{folder}: tensor {info.name!r} is in both {both}: remove one")
                tensors[info.name] = info
            files[file] = [info.name for info in found]
        if weight_map is not None:
            _check_weight_map(folder, weight_map, tensors)
        return cls(folder, config, tensors, files, metadata, weight_map is not None, maps)

    def view(self, name: str) -> torch.Tensor:
        """The tensor, contiguous, over the mapped file: a page is read when it is first touched.

        The mapping is copy-on-write: what is written through a view shows in this process's other views and
        never reaches the file. Only a tensor that is not aligned to its element size is copied.
        """
        if name not in self.tensors:
            near = ", ".join(nearest_names(name, self.tensors)) or "nothing like it"
            raise CheckpointError(f"{self.path} has no tensor {name!r}; nearest known: {near}")
        info = self.tensors[name]
        if info.file not in self._maps:
            raise CheckpointError(f"{self.path} is closed: open it again to read {name!r}")
        return tensor_over(self._maps[info.file], info)

    def close(self) -> None:
        """Let go of the files. A view still held stays valid: it keeps its own file mapped until it dies."""
        self._maps.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def check_regular(path: Path) -> None:
    """Refuse what is there and is no plain file: a pipe makes a reader wait for ever, /dev/zero has no end."""
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is no regular file: replace it by one")


def map_file(path: Path, flags: int) -> mmap.mmap:
    """Map a whole file readable and writable; `flags` says whether writes reach it (MAP_SHARED) or not."""
    check_regular(path)
    try:
        with open(path, "r+b" if flags & mmap.MAP_SHARED else "rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            if size < 8:
                raise CheckpointError(f"{path} is truncated: {size} bytes hold no header; fetch it again")
            return mmap.mmap(handle.fileno(), size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be mapped: {error.strerror}") from error


def tensor_over(memory: mmap.mmap, info: TensorInfo) -> torch.Tensor:
    """The tensor that `info` describes, over `memory`, which it keeps mapped."""
    if info.nbytes == 0:
        return torch.empty(info.shape, dtype=info.dtype)
    if info.offset % info.dtype.itemsize:
        copy = bytearray(memory[info.offset : info.offset + info.nbytes])
        return torch.frombuffer(copy, dtype=info.dtype).view(info.shape)
    count = info.nbytes // info.dtype.itemsize
    return torch.frombuffer(memory, dtype=info.dtype, count=count, offset=info.offset).view(info.shape)


def read_json_object(path: Path) -> dict:
    check_regular(path)
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def _read_weight_map(folder: Path) -> dict[str, str] | None:
    """The index's {tensor name: file}, every file being there; None for one file without an index."""
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if not index.exists():
        if single.exists():
            return None
        stray = next((f", only {file.name}" for file in sorted(folder.glob("*.safetensors"))), "")
        raise CheckpointError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}{stray}: fetch it")
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to file names")
    files = sorted(set(weight_map.values()))
    if single.exists() and SINGLE_FILE not in files:
        why = "transformers would load the former and ignore the latter: remove one"
        raise CheckpointError(f"{folder} has {SINGLE_FILE} and an index that does not name it; {why}")
    for file in files:
        if ".." in PurePath(file).parts or PurePath(file).is_absolute():
            raise CheckpointError(f"{index} names {file!r}, which leads out of the folder")
    if missing := [file for file in files if not (folder / file).is_file()]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{index} names {missing[0]}{more}, a shard missing from the folder: fetch it")
    return weight_map


def check_inside(folder: Path, file: str) -> None:
    """Refuse a link out of the folder, except into huggingface_hub's cache, where every file is a link."""
    allowed = [folder.resolve()]
    if allowed[0].parent.name == "snapshots":  # snapshots/<revision>/<file> -> ../../blobs/<hash>
        allowed.append(allowed[0].parent.parent / "blobs")
    target = (folder / file).resolve()
    if not any(target.is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{folder / file} links to {target}, outside the folder: copy the file into it")


def _check_weight_map(folder: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    index = folder / INDEX_FILE
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            where = f"it is in {tensors[name].file}" if name in tensors else "no file does"
            raise CheckpointError(f"{index} lists {name!r} in {file}, which does not hold it; {where}")
    for name, info in tensors.items():
        if name not in weight_map:
            raise CheckpointError(f"{folder / info.file} holds {name!r}, which {INDEX_FILE} does not list")


def _parse_header(path: Path, file: str, memory: mmap.mmap) -> tuple[list[TensorInfo], dict[str, str]]:
    """A safetensors file: 8 bytes little-endian header length, that much JSON, then data without holes."""
    length, size = int.from_bytes(memory[:8], "little"), len(memory)
    data = 8 + length
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path} claims a header of {length} bytes, over 100 MB: no safetensors file")
    if data > size:
        raise CheckpointError(f"{path} is truncated: its header misses {data - size} bytes; fetch it again")
    try:
        header = json.loads(memory[8:data].decode("utf-8"), **STRICT)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a header that is not JSON: {error}; fetch it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a header that is a JSON {type(header).__name__}, not an object")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path} has a __metadata__ that does not map strings to strings")
    infos = [_parse_entry(path, file, data, name, entry) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    end, previous = data, "the header"
    for info in infos:
        if info.offset != end:
            what = "overlaps" if info.offset < end else f"leaves a hole of {info.offset - end} bytes after"
            raise CheckpointError(f"{path}: tensor {info.name!r} {what} {previous}; fetch it again")
        end, previous = info.offset + info.nbytes, repr(info.name)
    if end > size:
        raise CheckpointError(f"{path} is truncated: {end - size} of {end} bytes are missing; fetch it again")
    if end < size:
        raise CheckpointError(f"{path} has {size - end} bytes that no tensor owns at its end; fetch it again")
    return infos, metadata


def _parse_entry(path: Path, file: str, data: int, name: str, entry: dict) -> TensorInfo:
    """One entry of a header; data_offsets count from `data`."""
    try:
        kind, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        name.encode()  # JSON can smuggle in half a surrogate pair
        sizes_proper = all(type(n) is int and 0 <= n < 2**63 for n in (*shape, start, end))
        if not (isinstance(kind, str) and isinstance(shape, list) and sizes_proper):
            raise TypeError
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: tensor {name!r} has no proper dtype, shape, data_offsets") from error
    if kind not in DTYPES:
        raise CheckpointError(f"{path}: tensor {name!r} has dtype {kind}; known are {' '.join(DTYPES)}")
    dtype = DTYPES[kind]
    nbytes = dtype.itemsize
    for n in accumulate(shape, mul):  # also where a later 0 makes the product small
        if n * dtype.itemsize >= 2**63:
            raise CheckpointError(f"{path}: tensor {name!r} has the shape {shape}, which no file can hold")
        nbytes = n * dtype.itemsize
    if end - start != nbytes:
        need = f"{kind} {shape} takes {nbytes}"
        raise CheckpointError(f"{path}: tensor {name!r} has {end - start} bytes, but {need}; fetch it again")
    return TensorInfo(name, dtype, tuple(shape), file, data + start, nbytes)


def _reject_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _float(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text} is out of range")
    return value


def _integer(text: str) -> int | float:
    return -0.0 if text == "-0" else int(text)  # as the safetensors library reads it: no size, no offset


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, value in pairs:
        for text in (key, value) if isinstance(value, str) else (key,):
            text.encode()  # half a surrogate pair is a ValueError
    if len(found := dict(pairs)) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in (k for k, _ in pairs[:i]))
        raise ValueError(f"{twice!r} is there twice")
    return found


# The header is read as strictly as the safetensors library reads it.
STRICT: Any = {
    "parse_constant": _reject_constant,
    "parse_float": _float,
    "parse_int": _integer,
    "object_pairs_hook": _object,
}
