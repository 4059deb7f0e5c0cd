"""Checkpoint folders as hub repositories have them: published names, several shards, hub-style config."""

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from toy_models.builder import build, config_dict
from toy_models.randomise import SEED, kind_of, named_tensors, random_blocks

_SAFETENSORS_DTYPE = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write(row: str, folder: str | Path, *, dtype: torch.dtype | None = None, shards: int = 3) -> Path:
    """Write the row's model as a checkpoint folder and return the folder.

    dtype: of the tensors and of config.json's torch_dtype; None keeps the row's own. shards: how many files
    to aim for; with one there is no index file. The names on disk are the published ones (Mixtral's
    `block_sparse_moe.experts.0.w1`, ...), see `save`.
    config.json is the row's own dict: the one that transformers saves is not in the hub's format
    (`rope_parameters`, ...).
    """
    if shards < 1:
        raise ValueError(f"shards={shards}: a checkpoint has at least one file")
    folder = Path(folder)
    config = config_dict(row)
    stored: torch.dtype = dtype or getattr(torch, config["torch_dtype"])
    model = build(row, dtype=stored)
    sizes = [tensor.nbytes for tensor in named_tensors(model).values()]
    # Files are filled one after another, so each but the last ends at most one tensor short of its limit.
    limit = sum(sizes) if shards == 1 else math.ceil(sum(sizes) / shards) + max(sizes)
    save(model, folder, max_shard_size=limit)
    _write_json(folder / "config.json", {**config, "torch_dtype": str(stored).removeprefix("torch.")})
    return folder


# transformers has a conversion that would save experts one by one; these are published as they are in memory, fused.
_PUBLISHED_AS_IN_MEMORY = ("qwen3_5_moe_text",)


def save(model: PreTrainedModel, folder: str | Path, **kwargs) -> None:
    """`model.save_pretrained` with the published names and shapes."""
    as_in_memory = model.config.model_type in _PUBLISHED_AS_IN_MEMORY
    model.save_pretrained(folder, save_original_format=not as_in_memory, **kwargs)


def write_config_checkpoint(
    config: dict, folder: str | Path, *, dtype: torch.dtype, max_shard_bytes: int, seed: int = SEED
) -> Path:
    """Write a checkpoint of `random_tensor` weights for a hub-style config of any size; return the folder.

    The model exists only on the meta device; values are made and written a block at a time by a thread per
    core, so memory stays at a few MiB. A tensor larger than `max_shard_bytes` gets a file of its own.
    ValueError for a model whose in-memory names are not the published ones (mixtures of experts) and for a
    dtype other than float32, bfloat16 and float16.
    """
    if dtype not in _SAFETENSORS_DTYPE:
        raise ValueError(f"{dtype}: a checkpoint here is one of {', '.join(map(str, _SAFETENSORS_DTYPE))}")
    folder = Path(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)))
    if get_model_conversion_mapping(model, add_legacy=False):
        raise ValueError(
            f"{config['model_type']}: transformers renames or fuses this model's tensors, so its names in "
            "memory are not the published ones; use a dense model, or write(row, folder) for a toy"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", {**config, "torch_dtype": str(dtype).removeprefix("torch.")})

    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards = _fill_shards(sizes, max_shard_bytes)
    weight_map = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, shard in enumerate(shards, start=1):
            part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            file = f"model{part}.safetensors"
            weight_map |= dict.fromkeys(shard, file)
            _write_shard(folder / file, {name: shapes[name] for name in shard}, dtype, seed, pool)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    return folder


def _fill_shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Tensor names in the model's order, cut into files of at most `limit` bytes, or of one larger tensor."""
    shards: list[list[str]] = []
    used = 0
    for name, size in sizes.items():
        if not shards or used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _write_shard(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int, pool: ThreadPoolExecutor
) -> None:
    """One safetensors file: eight bytes of header length, the JSON header, the tensors back to back."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS_DTYPE[dtype], "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # tensors start at a multiple of eight bytes

    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.flush()
        jobs = []
        for name in sorted(shapes, key=lambda name: -math.prod(shapes[name])):  # the longest first
            offset = 8 + len(head) + header[name]["data_offsets"][0]
            jobs.append(pool.submit(_write_tensor, file, offset, name, shapes[name], dtype, seed))
        for job in jobs:
            job.result()


def _write_tensor(
    file: BinaryIO, offset: int, name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int
) -> None:
    for block in random_blocks(name, shape, seed=seed, kind=kind_of(name, shape)):
        data = torch.from_numpy(block).to(dtype).view(torch.uint8).numpy()
        offset += os.pwrite(file.fileno(), data, offset)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
