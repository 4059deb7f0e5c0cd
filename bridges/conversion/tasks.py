"""Copies applied to real models: import, export in place, live export, gradients.

A task is one Megatron parameter of this rank with its copies. Import and export run the same tasks in the two
directions; neither needs a collective (export meets at two barriers, so that nobody writes before the files exist or
renames them before all is written).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state

from bridges.conversion.mapping import MappingError, MegatronMappingRegistry, ParamMapping
from bridges.conversion.plan import Copy, Shape, copies, shard_of, symbol_sizes
from bridges.conversion.walk import unwrap, walk_of
from bridges.layout import Coords, Layout


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


_LAYER = re.compile(r"(.+?\.\d+)\.(.+)")
_EXPERT = re.compile(r"(.*\.experts\..*?(?:weight|bias))(\d+)$")


def global_tensors(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """(global name, tensor) of every parameter and persistent buffer of this rank.

    Megatron numbers layers and experts from 0 on each rank; the layer's own `layer_number` and the expert-parallel rank
    say which ones they are. All heads of multi-token prediction are in one chunk.
    """
    for wrapped in chunks:
        chunk = unwrap(wrapped)
        placed = {layer.path: layer.name for layer in walk_of(getattr(chunk, "config", None)).layers(chunk)}
        for local, tensor in chunk.state_dict(keep_vars=True).items():
            if not torch.is_tensor(tensor) or local.endswith("_extra_state"):
                continue
            name = local
            if (match := _LAYER.match(local)) and match[1] in placed:
                name = f"{placed[match[1]]}.{match[2]}"
            if match := _EXPERT.match(name):
                module = chunk.get_submodule(local.rpartition(".")[0])
                offset = parallel_state.get_expert_model_parallel_rank() * module.num_gemms
                name = f"{match[1]}{int(match[2]) + offset}"
            yield name, tensor


def build_tasks(
    chunks, registry: MegatronMappingRegistry, hf_shapes: dict[str, Shape], provider, repeated: dict[str, str]
) -> list[ConversionTask]:
    """The tasks of this rank in model order; `repeated` as in `repeated_tensors`.

    Raises MappingError or PlanError for the first tensor that does not fit.
    """
    layout, coords = current_layout(provider)
    tied = provider.share_embeddings_and_output_weights
    tasks = []
    walk = walk_of(provider)
    for name, tensor in global_tensors(chunks):
        second_embedding = name == walk.embedding_weight and coords.pp > 0
        alias = walk.embedding_weight if (tied and name == walk.output_weight) or second_embedding else None
        mapping, parts = registry.megatron_to_hf_lookup(alias or name)
        plan = copies(
            name,
            mapping,
            parts,
            hf_shapes,
            symbol_sizes(mapping, provider, name),
            shard_of(mapping, layout, coords),
            tuple(tensor.shape),
        )
        repeats = [(copy, again) for copy in plan for again, source in repeated.items() if source == copy.hf]
        tasks.append(ConversionTask(name, mapping, tensor, plan, alias, [] if alias else repeats))
    return tasks


def repeated_tensors(
    declared: dict[str, str], registry: MegatronMappingRegistry, hf_shapes: Iterable[str], provider: Any
) -> dict[str, str]:
    """{tensor of the checkpoint: the one that it repeats}: those that a family declares (patterns with *), and the head of
    a tied model that is on disk all the same."""
    found = {n: source for pattern, source in declared.items() for n in matching([pattern], hf_shapes)}
    if provider.share_embeddings_and_output_weights:
        walk = walk_of(provider)
        try:
            head, embedding = (
                registry.megatron_to_hf_lookup(name)[1][0].hf for name in (walk.output_weight, walk.embedding_weight)
            )
        except MappingError:
            return found
        found = {n: embedding if source == head else source for n, source in found.items()}
        found |= {n: embedding for n in hf_shapes if n == head}
    return found


def matching(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """The names that fit a pattern, in which * is a number."""
    compiled = [re.compile(re.escape(pattern).replace(r"\*", r"\d+")) for pattern in patterns]
    return [name for name in names if any(pattern.fullmatch(name) for pattern in compiled)]
