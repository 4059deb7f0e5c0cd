"""Checkpoint folders compared bit for bit, and digests of them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import torch

from bridges.checkpoints.reader import INT_OF_SIZE, Checkpoint, CheckpointError


def same_bytes(a: Checkpoint, b: Checkpoint, *, chunk_elements: int = 1 << 22) -> list[str]:
    """What differs between the tensors of two checkpoints, one line each; [] says that every bit is the same.

    `a` is what was expected. Elements are compared as integers: a NaN equals itself, -0.0 differs from 0.0.
    Beyond the mapped files it takes one chunk of flags of memory.
    """
    lines = [f"{name}: missing" for name in a.tensors if name not in b.tensors]
    lines += [f"{name}: unexpected" for name in b.tensors if name not in a.tensors]
    for name, expected in a.tensors.items():
        found = b.tensors.get(name)
        if found is None:
            continue
        for field in ("dtype", "shape", "file"):
            x, y = getattr(expected, field), getattr(found, field)
            if x != y:
                lines.append(f"{name}: {field} {x} != {y}")
        if (expected.dtype, expected.shape) == (found.dtype, found.shape):
            lines += _different_elements(name, a.view(name), b.view(name), chunk_elements)
    return lines


def _different_elements(name: str, a: torch.Tensor, b: torch.Tensor, chunk_elements: int) -> list[str]:
    """One line with the count and with index and values of the first differing element, or none."""
    flat_a, flat_b, first, count = a.flatten(), b.flatten(), None, 0
    bits_a, bits_b = (flat.view(INT_OF_SIZE[flat.itemsize]) for flat in (flat_a, flat_b))
    for start in range(0, len(bits_a), chunk_elements):
        x, y = (bits[start : start + chunk_elements] for bits in (bits_a, bits_b))
        if not torch.equal(x, y):
            different = x != y
            first = start + int(different.byte().argmax()) if first is None else first
            count += int(different.sum())
    if first is None:
        return []
    index = [int(i) for i in np.unravel_index(first, a.shape)]
    values = f"{flat_a[first].item()} != {flat_b[first].item()}"
    return [f"{name}: {count} of {a.numel()} elements differ, first at {index}: {values}"]


def source_digest(path: str | os.PathLike) -> str:
    """sha256 over name and bytes of every safetensors file below `path`, whether the index names it or not.

    Taken before and after, it proves that a source was left untouched.
    """
    files = sorted(Path(path).rglob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path} holds no safetensors file to digest")
    total = hashlib.sha256()
    for file in files:
        with open(file, "rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        total.update(f"{digest} {file.relative_to(path)}\n".encode())
    return total.hexdigest()
