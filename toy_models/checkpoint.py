"""Checkpoint folders as hub repositories have them: published names, several shards, hub-style config."""

import json
import math
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from toy_models import mtp
from toy_models.builder import attach_mtp, build, mtp_spec, published_as_in_memory, reference_of
from toy_models.catalogue import config_dict
from toy_models.randomise import SEED, kind_of, named_tensors, random_blocks
from toy_models.reference import native_config, publish, restore

_SAFETENSORS_DTYPE = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write(row: str, folder: str | Path, *, dtype: torch.dtype | None = None, shards: int = 3) -> Path:
    """Write the row's model as a checkpoint folder and return the folder.

    dtype: of the tensors and of config.json's torch_dtype; None keeps the row's own. shards: how many files
    to aim for; with one there is no index file. config.json is the row's own dict: the one that transformers
    saves is not in the hub's format (`rope_parameters`, ...).
    """
    if shards < 1:
        raise ValueError(f"shards={shards}: a checkpoint has at least one file")
    folder = Path(folder)
    config = config_dict(row)
    key = "dtype" if "dtype" in config else "torch_dtype"
    if dtype is None and config.get(key, "float32") != "float32":
        raise ValueError(
            f"row {row} says {key} = {config[key]!r}: a row is float32, because goldens are; write(..., dtype=...) rounds it"
        )
    stored = dtype or torch.float32
    save(row, build(row, dtype=stored), folder, shards=shards)
    _write_json(folder / "config.json", {**config, key: str(stored).removeprefix("torch.")})
    return folder


def published(row: str, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors of a model of the row's class under their published names (Mixtral's
    `block_sparse_moe.experts.0.w1`, ...): transformers restores them on saving, and for a class of another name the row's
    `_reference` does. The last are those of its heads of multi-token prediction (`model.mtp`)."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_original_format=not published_as_in_memory(row))
        main = publish(reference_of(row), _read_folder(folder))
    if (spec := mtp_spec(row)) is None or getattr(model, "mtp", None) is None:
        return main
    heads: Any = model.mtp
    return main | mtp.published(spec, mtp.parameters(heads), model.config.num_hidden_layers, main)


def save(row: str, model: PreTrainedModel, folder: str | Path, *, shards: int = 1) -> None:
    """Write the `published` tensors of a model of the row's class, in files of about the same size, and config.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = published(row, model)
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    # Files are filled one after another, so each but the last ends at most one tensor short of its limit.
    total = sum(sizes.values())
    files = _fill_shards(sizes, total if shards == 1 else math.ceil(total / shards) + max(sizes.values()))
    for number, names in enumerate(files, start=1):
        held = {name: tensors[name].clone(memory_format=torch.contiguous_format) for name in names}
        save_file(held, folder / _shard_name(number, len(files)), {"format": "pt"})
    _write_index(folder, files, total)
    _write_json(folder / "config.json", config_dict(row))


def load(row: str, folder: str | Path, **options) -> tuple[PreTrainedModel, dict]:
    """(model, transformers' loading info) of a published folder of the row's family, on transformers' own path, with its
    heads of multi-token prediction, which transformers has a model of its own for. KeyError for a tensor of theirs that
    is not there."""
    folder = Path(folder)
    options = {"output_loading_info": True, "attn_implementation": "eager", **options}
    spec, reference = mtp_spec(row), reference_of(row)
    like: Any = build(row) if spec or reference else None
    if reference is None:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    else:
        own = mtp.published(spec, mtp.parameters(like.mtp), like.config.num_hidden_layers) if spec else {}
        main = {name: tensor for name, tensor in _read_folder(folder).items() if name not in own}
        config = json.loads((folder / "config.json").read_text())
        with tempfile.TemporaryDirectory() as native:
            like.save_pretrained(native)
            shapes = {name: tensor.shape for name, tensor in _read_folder(native).items()}
            tensors = {name: t.contiguous() for name, t in restore(reference, main, shapes).items()}
            save_file(tensors, f"{native}/model.safetensors", {"format": "pt"})
            _write_json(Path(native) / "config.json", native_config(reference, config))
            loaded = AutoModelForCausalLM.from_pretrained(native, **options)
    model, info = loaded
    attach_mtp(model, mtp.load(spec, model, folder) if spec else None)
    if spec:
        named = (mtp.published, mtp.placed)
        tensors, layers = mtp.parameters(like.mtp), like.config.num_hidden_layers
        of_heads = {name for found in named for name in found(spec, tensors, layers)}
        info["unexpected_keys"] = set(info["unexpected_keys"]) - of_heads
    return model, info


def _read_folder(folder: str | Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(Path(folder).glob("*.safetensors")) for name, t in load_file(file).items()}


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
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, shard in enumerate(shards, start=1):
            file = folder / _shard_name(number, len(shards))
            _write_shard(file, {name: shapes[name] for name in shard}, dtype, seed, pool)
    _write_index(folder, shards, sum(sizes.values()))
    return folder


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"


def _write_index(folder: Path, shards: list[list[str]], size: int) -> None:
    """The index of several files; one file has none."""
    if len(shards) > 1:
        weight_map = {name: _shard_name(i, len(shards)) for i, names in enumerate(shards, start=1) for name in names}
        _write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map}
        )


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
