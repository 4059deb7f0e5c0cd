"""All hypothesis strategies of the tests."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

from bridges.checkpoint import DTYPES, SINGLE_FILE


@st.composite
def checkpoint_tensors(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of any dtype a checkpoint may hold, 0 to 3 dims of 0 to 4, all bits random: also NaN."""
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    nbytes = count * dtype.itemsize
    content = torch.frombuffer(
        bytearray(draw(st.binary(min_size=nbytes, max_size=nbytes))), dtype=torch.uint8
    )
    return (content & 1 if dtype == torch.bool else content).view(dtype).view(shape)


@st.composite
def checkpoint_files(draw: st.DrawFn) -> dict[str, dict[str, torch.Tensor]]:
    """{file: {tensor name: tensor}}, 1 to 3 files with Hugging Face's names, any Unicode in the tensors'."""
    names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
        lambda name: name != "__metadata__"
    )
    tensors = draw(st.dictionaries(names, checkpoint_tensors(), min_size=1, max_size=8))
    count = draw(st.integers(1, min(3, len(tensors))))
    if count == 1:
        return {SINGLE_FILE: tensors}
    files = {f"model-{i + 1:05}-of-{count:05}.safetensors": {} for i in range(count)}
    for i, (name, tensor) in enumerate(tensors.items()):
        files[list(files)[i % count]][name] = tensor
    return files
