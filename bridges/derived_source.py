"""The Hugging Face checkpoint that a model without a source is exported as: names, shapes and files from its mappings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from bridges.checkpoints.megatron import Outline
from bridges.checkpoints.reader import SINGLE_FILE, TensorInfo
from bridges.conversion.agreement import of_all_ranks
from bridges.conversion.mapping import EMBEDDING, OUTPUT, MegatronMappingRegistry
from bridges.conversion.plan import Shape, shard_of
from bridges.conversion.shapes import tensors_of
from bridges.conversion.tasks import current_layout, global_tensors

MAX_FILE_BYTES = 5_000_000_000  # as transformers' save_pretrained cuts


def derived_source(chunks: Any, registry: MegatronMappingRegistry, provider: Any) -> Outline:
    """The outline of the checkpoint that a model makes: dtypes are the parameters', files hold at most 5 GB or one tensor.

    All ranks must call it together; each knows its own parameters, and the answer is the same on all.
    """
    layout, coords = current_layout(provider)
    mine: dict[str, tuple[torch.dtype, Shape]] = {}
    for name, tensor in global_tensors(chunks):
        tied_head = provider.share_embeddings_and_output_weights and name == OUTPUT
        if tied_head or (name == EMBEDDING and coords.pp > 0):
            continue
        mapping, parts = registry.megatron_to_hf_lookup(name)
        size = shard_of(mapping, layout, coords).size
        for hf, shape in tensors_of(name, mapping, parts, provider, size, tuple(tensor.shape)).items():
            mine[hf] = (tensor.dtype, shape)
    whole = {name: said for rank in of_all_ranks(mine) for name, said in rank.items()}
    return outline_of(whole)


def outline_of(tensors: dict[str, tuple[torch.dtype, Shape]], limit: int = MAX_FILE_BYTES) -> Outline:
    """Tensors in their order, cut into files of at most `limit` bytes, or of one larger tensor."""
    files: list[list[str]] = []
    used = 0
    nbytes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in tensors.items()}
    for name, size in nbytes.items():
        if not files or used + size > limit:
            files.append([])
            used = 0
        files[-1].append(name)
        used += size
    count = len(files)
    named = {
        f"model-{n:05d}-of-{count:05d}.safetensors" if count > 1 else SINGLE_FILE: names
        for n, names in enumerate(files, start=1)
    }
    infos = {
        name: TensorInfo(name, tensors[name][0], tensors[name][1], file, 0, nbytes[name])
        for file, names in named.items()
        for name in names
    }
    metadata = {file: {"format": "pt"} for file in named}
    return Outline(Path("(no source)"), {}, infos, named, metadata, count > 1, {}, {})
