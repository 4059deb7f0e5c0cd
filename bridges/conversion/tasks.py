"""Copies applied to real models: import, export in place, live export, gradients.

A task is one Megatron parameter of this rank with its copies. Import and export run the same tasks in the two
directions; neither needs a collective (export meets at two barriers, so that nobody writes before the files exist or
renames them before all is written).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from bridges.checkpoints.reader import Checkpoint
from bridges.conversion.mapping import REPLICATED, MappingError, MegatronMappingRegistry
from bridges.conversion.mapping import Mapping as ParamMapping
from bridges.conversion.plan import Copy, PlanError, Shape, copies, shard_of, symbol_sizes
from bridges.conversion.views import Box
from bridges.layout import Coords, Layout

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"

Progress = Callable[[str], None]


@dataclass
class ConversionTask:
    """One parameter or persistent buffer of this rank.

    `alias_of` names the parameter of which this is a second copy (a tied head on the last pipeline stage, the embedding
    of an MTP stage): imported, never exported. `repeats` are the copies whose values stand on disk once more, each with
    the name of the Hugging Face tensor that repeats them.
    """

    param_name: str  # global: layer and expert numbers of the whole model
    mapping: ParamMapping
    tensor: torch.Tensor
    copies: list[Copy]
    alias_of: str | None = None
    repeats: list[tuple[Copy, str]] = field(default_factory=list)


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
    say which ones they are. All heads of multi-token prediction are in one chunk.
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
    chunks, registry: MegatronMappingRegistry, hf_shapes: dict[str, Shape], provider, repeated: dict[str, str]
) -> list[ConversionTask]:
    """The tasks of this rank in model order; `repeated` as in `repeated_tensors`.

    Raises MappingError or PlanError for the first tensor that does not fit.
    """
    layout, coords = current_layout(provider)
    tied = provider.share_embeddings_and_output_weights
    tasks = []
    for name, tensor in global_tensors(chunks):
        second_embedding = name == EMBEDDING and coords.pp > 0
        alias = EMBEDDING if (tied and name == OUTPUT) or second_embedding else None
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
        repeats = [(copy, again) for copy in plan for again, source in repeated.items() if source == copy.hf]
        tasks.append(ConversionTask(name, mapping, tensor, plan, alias, [] if alias else repeats))
    return tasks


def repeated_tensors(
    declared: dict[str, str], registry: MegatronMappingRegistry, hf_shapes: Iterable[str], *, tied: bool
) -> dict[str, str]:
    """{tensor of the checkpoint: the one that it repeats}: those that a family declares (patterns with *), and the head of
    a tied model that is on disk all the same."""
    found = {n: source for pattern, source in declared.items() for n in matching([pattern], hf_shapes)}
    if tied:
        try:
            head, embedding = (registry.megatron_to_hf_lookup(name)[1][0].hf for name in (OUTPUT, EMBEDDING))
        except MappingError:
            return found
        found = {n: embedding if source == head else source for n, source in found.items()}
        found |= {n: embedding for n in hf_shapes if n == head}
    return found


def matching(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """The names that fit a pattern, in which * is a number."""
    compiled = [re.compile(re.escape(pattern).replace(r"\*", r"\d+")) for pattern in patterns]
    return [name for name in names if any(pattern.fullmatch(name) for pattern in compiled)]


def of_all_ranks(value: Any) -> list[Any]:
    """What each rank gave, on every rank. Nobody goes on before all have come: a broadcast would let its source go on
    alone."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


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
        for copy, again in task.repeats:
            same = [box_view(source.view(name), copy.hf_box) for name in (copy.hf, again)]
            if not torch.equal(*same):
                raise PlanError(
                    f"{again} differs from {copy.hf}, of which it should be a copy, and Megatron holds one of them: "
                    "remove it from the checkpoint (a head: or set tie_word_embeddings to false)"
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


def destinations(task: ConversionTask) -> list[tuple[Copy, str]]:
    """What an export writes: each copy with the Hugging Face tensor it goes to."""
    return [(copy, copy.hf) for copy in task.copies] + task.repeats


def written(tasks: Iterable[ConversionTask], coords: Coords) -> set[str]:
    """The Hugging Face tensors of which this rank is the writer of some block."""
    return {name for task in tasks if is_writer(task, coords) for _, name in destinations(task)}


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
            for copy, name in destinations(task):
                box_view(view(name), copy.hf_box).copy_(box_view(task.tensor, copy.megatron_box))
        if progress:
            progress(task.param_name)


@torch.no_grad()
def live_export(
    tasks: Sequence[ConversionTask], coords: Coords, source: Checkpoint, ignored: set[str], *, cpu: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """(hf name, whole tensor) one by one on every rank, fed by collectives: for weight synchronisation. Names, shapes and
    dtypes are the source's, and so are the values of what is `ignored`.

    Writers fill their blocks of a zero tensor and the bytes are summed over all ranks, which is exact since every byte
    but one is zero. All ranks must consume the iterator together.
    """
    writers: dict[str, list[tuple[torch.Tensor, Copy]]] = {}
    for task in tasks:
        if is_writer(task, coords):
            for copy, name in destinations(task):
                writers.setdefault(name, []).append((task.tensor, copy))
    device = tasks[0].tensor.device
    for name, info in source.tensors.items():
        if name in ignored:
            yield name, source.view(name).to("cpu" if cpu else device, copy=True)
            continue
        whole = torch.zeros(info.shape, dtype=info.dtype, device=device)
        for tensor, copy in writers.get(name, ()):
            box_view(whole, copy.hf_box).copy_(box_view(tensor, copy.megatron_box))
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(whole.view(-1).view(torch.uint8))
        yield name, whole.cpu() if cpu else whole
