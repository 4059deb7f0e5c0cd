"""Copies applied to real models: import, export in place, live export, gradients.

A task is one Megatron parameter of this rank with its copies. Import and export run the same tasks in the two
directions; neither needs a collective (export meets at two barriers, so that nobody writes before the files exist or
renames them before all is written).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from bridges.checkpoint import Checkpoint
from bridges.layout import Coords, Layout
from bridges.mapping import REPLICATED, MappingError, MegatronMappingRegistry
from bridges.mapping import Mapping as ParamMapping
from bridges.plan import Copy, PlanError, Shape, copies, shard_of, symbol_sizes
from bridges.views import Box

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"

Progress = Callable[[str], None]


@dataclass
class ConversionTask:
    """One parameter or persistent buffer of this rank.

    `alias_of` names the parameter of which this is a second copy (a tied head on the last pipeline stage): imported,
    never exported. `mirror` names a Hugging Face tensor on disk that repeats this one.
    """

    param_name: str  # global: layer and expert numbers of the whole model
    mapping: ParamMapping
    tensor: torch.Tensor
    copies: list[Copy]
    alias_of: str | None = None
    mirror: str | None = None


def current_layout(provider) -> tuple[Layout, Coords]:
    """The layout and coordinates of this process, read from Megatron's groups."""
    p = parallel_state
    layout = Layout(
        tp=p.get_tensor_model_parallel_world_size(),
        pp=p.get_pipeline_model_parallel_world_size(),
        vpp=provider.virtual_pipeline_model_parallel_size or 1,
        ep=p.get_expert_model_parallel_world_size(),
        etp=p.get_expert_tensor_parallel_world_size() or 1,
        cp=p.get_context_parallel_world_size(),
        sp=provider.sequence_parallel,
        dp=p.get_data_parallel_world_size(),
        split=provider.num_layers_per_chunk,
    )
    coords = Coords(
        tp=p.get_tensor_model_parallel_rank(),
        cp=p.get_context_parallel_rank(),
        dp=p.get_data_parallel_rank(),
        pp=p.get_pipeline_model_parallel_rank(),
        etp=p.get_expert_tensor_parallel_rank() or 0,
        ep=p.get_expert_model_parallel_rank(),
        edp=p.get_expert_data_parallel_rank(),
    )
    return layout, coords


_EXPERT = re.compile(r"(.*\.experts\..*?(?:weight|bias))(\d+)$")


def unwrap(chunk: Any) -> Any:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def global_tensors(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """(global name, tensor) of every parameter and persistent buffer of this rank.

    Megatron numbers layers and experts from 0 on each rank; the layer's own `layer_number` and the expert-parallel rank
    say which ones they are.
    """
    for wrapped in chunks:
        chunk = unwrap(wrapped)
        layers = {i: layer.layer_number - 1 for i, layer in enumerate(chunk.decoder.layers)}
        for name, tensor in chunk.state_dict(keep_vars=True).items():
            if not torch.is_tensor(tensor) or name.endswith("_extra_state"):
                continue
            if match := re.match(r"decoder\.layers\.(\d+)\.", name):
                name = f"decoder.layers.{layers[int(match[1])]}.{name[match.end() :]}"
            if match := _EXPERT.match(name):
                module = chunk.get_submodule(_local_module(name, layers))
                offset = parallel_state.get_expert_model_parallel_rank() * module.num_gemms
                name = f"{match[1]}{int(match[2]) + offset}"
            yield name, tensor


def _local_module(global_name: str, layers: dict[int, int]) -> str:
    """The local name of the module that holds a globally named parameter."""
    module = global_name.rpartition(".")[0]
    if match := re.match(r"decoder\.layers\.(\d+)\.", module):
        local = next(i for i, g in layers.items() if g == int(match[1]))
        module = f"decoder.layers.{local}.{module[match.end() :]}"
    return module


def build_tasks(
    chunks, registry: MegatronMappingRegistry, hf_shapes: dict[str, Shape], provider
) -> list[ConversionTask]:
    """The tasks of this rank in model order. Raises MappingError or PlanError for the first tensor that does not fit."""
    layout, coords = current_layout(provider)
    tied = provider.share_embeddings_and_output_weights
    head = tied_head(registry, hf_shapes) if tied else None
    tasks = []
    for name, tensor in global_tensors(chunks):
        alias = EMBEDDING if tied and name == OUTPUT else None
        mapping, parts = registry.megatron_to_hf_lookup(alias or name)
        plan = copies(
            name,
            mapping,
            parts,
            hf_shapes,
            symbol_sizes(mapping, provider),
            shard_of(mapping, layout, coords),
            tuple(tensor.shape),
        )
        tasks.append(ConversionTask(name, mapping, tensor, plan, alias, head if name == EMBEDDING else None))
    return tasks


def tied_head(registry: MegatronMappingRegistry, hf_shapes) -> str | None:
    """The head's Hugging Face name when a tied checkpoint holds it all the same (transformers then ignores it)."""
    try:
        _, parts = registry.megatron_to_hf_lookup(OUTPUT)
    except MappingError:
        return None
    return parts[0].hf if parts[0].hf in hf_shapes else None


def box_view(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """The block of a contiguous tensor that a box describes, as a view."""
    return tensor.detach().as_strided(box.sizes, box.strides, tensor.storage_offset() + box.offset)


_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def check_dtype(name: str, source: torch.dtype, target: torch.dtype, *, lossy: bool) -> None:
    """Raise PlanError when values cannot be carried over: quantised codes, or fewer bits without permission."""
    if source == target:
        return
    if source in _FP8 or (source in _INTEGERS) != (target in _INTEGERS):
        raise PlanError(
            f"{name} is {_short(source)} in the checkpoint and {_short(target)} in Megatron: quantised or "
            "integer weights are not converted; dequantise the checkpoint first"
        )
    widens = torch.promote_types(source, target) == target
    if not widens and not lossy:
        raise PlanError(
            f"{name} is {_short(source)} in the checkpoint and {_short(target)} in Megatron: precision would be "
            f"lost; set provider.params_dtype = {source} or allow it with lossy=True"
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def import_weights(
    tasks: Iterable[ConversionTask], source: Checkpoint, *, lossy: bool = False, progress: Progress | None = None
) -> None:
    """HF files -> this rank's tensors; only the pages a rank keeps are read. Vocabulary padding becomes zero."""
    for task in tasks:
        if task.mapping.padded:
            task.tensor.zero_()
        for copy in task.copies:
            check_dtype(copy.hf, source.tensors[copy.hf].dtype, task.tensor.dtype, lossy=lossy)
            block = box_view(source.view(copy.hf), copy.hf_box)
            box_view(task.tensor, copy.megatron_box).copy_(block)
            if task.mirror and not torch.equal(block, box_view(source.view(task.mirror), copy.hf_box)):
                raise PlanError(
                    f"{task.mirror} differs from {copy.hf} although tie_word_embeddings is true: remove one of "
                    "them or set tie_word_embeddings to false"
                )
        if progress:
            progress(task.param_name)


def is_writer(task: ConversionTask, coords: Coords) -> bool:
    """One replica writes each block: the first of every axis on which the parameter repeats."""
    if task.alias_of:
        return False
    replicated = task.mapping.sharding == REPLICATED
    if task.mapping.is_expert:
        return coords.edp == 0 and not (replicated and coords.etp)
    return coords.dp == 0 and coords.cp == 0 and not (replicated and coords.tp)


@torch.no_grad()
def export_weights(
    tasks: Iterable[ConversionTask],
    coords: Coords,
    view: Callable[[str], torch.Tensor],
    progress: Progress | None = None,
) -> None:
    """This rank's tensors -> `view(hf name)`, the blocks it is the writer of."""
    for task in tasks:
        if is_writer(task, coords):
            for copy in task.copies:
                for name in (copy.hf, task.mirror):
                    if name:
                        box_view(view(name), copy.hf_box).copy_(box_view(task.tensor, copy.megatron_box))
        if progress:
            progress(task.param_name)


@torch.no_grad()
def live_export(
    tasks: Sequence[ConversionTask],
    coords: Coords,
    names: Iterable[str],
    shape: dict[str, Shape],
    dtype: Callable[[str], torch.dtype],
    *,
    cpu: bool,
) -> Iterator[tuple[str, torch.Tensor]]:
    """(hf name, whole tensor) one by one on every rank, fed by collectives: for weight synchronisation.

    Writers fill their blocks of a zero tensor and the bytes are summed over all ranks, which is exact since every byte
    but one is zero. All ranks must consume the iterator together.
    """
    writers: dict[str, list[tuple[torch.Tensor, Copy]]] = {}
    for task in tasks:
        if is_writer(task, coords):
            for copy in task.copies:
                for name in filter(None, (copy.hf, task.mirror)):
                    writers.setdefault(name, []).append((task.tensor, copy))
    device = tasks[0].tensor.device
    for name in names:
        whole = torch.zeros(shape[name], dtype=dtype(name), device=device)
        for tensor, copy in writers.get(name, ()):
            box_view(whole, copy.hf_box).copy_(box_view(tensor, copy.megatron_box))
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(whole.view(-1).view(torch.uint8))
        yield name, whole.cpu() if cpu else whole


def unused_tensors(
    registry: MegatronMappingRegistry, names: Iterable[str], used: set[str], ignored: dict[str, str]
) -> list[str]:
    """Checkpoint tensors that no task of the whole model reads and no IGNORED_TENSORS pattern excuses."""
    patterns = [re.compile(re.escape(p).replace(r"\*", r"\d+")) for p in ignored]
    return [n for n in names if n not in used and not any(p.fullmatch(n) for p in patterns)]
