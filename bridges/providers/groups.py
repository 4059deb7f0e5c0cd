"""torch.distributed and Megatron's process groups for a layout."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state, tensor_parallel

from bridges.layout import Layout, LayoutError
from bridges.providers import cpu_substitutions

if TYPE_CHECKING:
    from bridges.providers.provider import GPTModelProvider


def ensure_process_groups(provider: GPTModelProvider, layout: Layout | None = None) -> None:
    """torch.distributed and Megatron's groups for the provider's layout; existing groups must have its sizes.

    Raises LayoutError when the world has fewer ranks than the layout needs, or another number.
    """
    if not torch.cuda.is_available():
        cpu_substitutions.announce()
    if not torch.distributed.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            torch.distributed.init_process_group(backend)
        else:
            torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    layout = layout or provider.layout
    world, needed = torch.distributed.get_world_size(), layout.tp * layout.pp * layout.cp
    if world % needed or (world // needed * layout.tp * layout.cp) % (layout.expert_tp * layout.ep):
        raise LayoutError(f"layout {layout} needs a multiple of {layout.world_size} ranks; {world} are running")
    if parallel_state.model_parallel_is_initialized():
        have = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_context_parallel_world_size(),
            parallel_state.get_expert_model_parallel_world_size(),
            parallel_state.get_expert_tensor_parallel_world_size(),
        )
        want = (layout.tp, layout.pp, layout.cp, layout.ep, layout.expert_tp)
        if have != want:
            raise LayoutError(f"process groups exist for tp, pp, cp, ep, etp = {have}; the provider wants {want}")
    else:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.expert_tp,
            create_gloo_process_groups=torch.cuda.is_available(),  # without a GPU the main groups are gloo's
        )
    parallel_state.set_virtual_pipeline_model_parallel_world_size(provider.virtual_pipeline_model_parallel_size)
    tracker: Any = tensor_parallel.get_cuda_rng_tracker()
    if not tracker.is_initialized():
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
