"""What each rank of a layout holds, as Megatron-Core itself builds it, on the meta device: no weights, no other process.

The groups are torch's fake ones. They have a size and this process's place in it and never talk, so a layout of
thousands of ranks is built stage by stage in one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from bridges.conversion.proof import Held
from bridges.conversion.tasks import global_tensors
from bridges.errors import GoldengateError
from bridges.layout import Layout
from bridges.providers import cpu_substitutions


class SkeletonError(GoldengateError, RuntimeError):
    """The process has process groups of its own, which fake ones must not replace."""


def holdings(provider: Any, layout: Layout) -> Iterator[tuple[tuple[int, int], list[Held]]]:
    """((pipeline rank, expert rank), what it holds in model order) for all of them, at tensor rank 0: the other tensor
    ranks hold the same names and shapes. `provider` is finalized, its sizes are `layout`'s.

    Changes torch.distributed and Megatron's groups of this process for good: run it in a forked one. Raises
    SkeletonError when there are process groups already.
    """
    if dist.is_initialized() or parallel_state.model_parallel_is_initialized():
        raise SkeletonError("this process has process groups: a layout is planned in a process without any")
    if not torch.cuda.is_available():
        cpu_substitutions.install()
    groups = _FakeGroups(layout)
    provider.perform_initialization = False
    provider.use_cpu_initialization = True  # on a GPU too: the parameters are on the meta device
    for stage in range(layout.pp):
        groups.stand_at(pp=stage, ep=0)
        with torch.device("meta"):
            chunks = provider.provide_chunks()
        for expert in range(layout.ep):
            groups.stand_at(pp=stage, ep=expert)
            yield (
                (stage, expert),
                [Held(name, tuple(tensor.shape), tensor.nbytes) for name, tensor in global_tensors(chunks)],
            )


class _FakeGroups:
    """Megatron's groups for one place in a layout. A group of any size, with this process at any place in it, is cut out of
    a fake world with enough ranks on either side."""

    def __init__(self, layout: Layout):
        from torch.testing._internal.distributed.fake_pg import FakeStore

        self.layout = layout
        self.here = layout.world_size * max(layout.ep, 1)
        dist.init_process_group("fake", store=FakeStore(), rank=self.here, world_size=2 * self.here + 1)
        self._made: dict[tuple[int, int], Any] = {}

    def group(self, size: int, rank: int) -> Any:
        if (size, rank) not in self._made:
            first = self.here - rank
            self._made[size, rank] = dist.new_group(list(range(first, first + size)))
        return self._made[size, rank]

    def stand_at(self, *, pp: int, ep: int) -> None:
        """Take the place of tensor rank 0 of a stage and expert rank: whatever Megatron asks its groups is answered for it."""
        x, s = self.layout, parallel_state
        tensor, alone = self.group(x.tp, 0), self.group(1, 0)
        experts, stages = self.group(x.ep, ep), self.group(x.pp, pp)
        both = self.group(x.expert_tp * x.ep, ep * x.expert_tp)
        found = {
            "_TENSOR_MODEL_PARALLEL_GROUP": tensor,
            "_PIPELINE_MODEL_PARALLEL_GROUP": stages,
            "_MODEL_PARALLEL_GROUP": self.group(x.tp * x.pp, pp * x.tp),
            "_CONTEXT_PARALLEL_GROUP": self.group(x.cp, 0),
            "_TENSOR_AND_CONTEXT_PARALLEL_GROUP": self.group(x.tp * x.cp, 0),
            "_EXPERT_MODEL_PARALLEL_GROUP": experts,
            "_EXPERT_TENSOR_PARALLEL_GROUP": self.group(x.expert_tp, 0),
            "_EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": both,
            "_EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP": self.group(
                x.expert_tp * x.ep * x.pp, pp * x.expert_tp * x.ep + ep * x.expert_tp
            ),
            "_EMBEDDING_GLOBAL_RANKS": [self.here],
            "_POSITION_EMBEDDING_GLOBAL_RANKS": [self.here],
            "_PIPELINE_GLOBAL_RANKS": dist.get_process_group_ranks(stages),
            "_TENSOR_MODEL_PARALLEL_GLOBAL_RANKS": dist.get_process_group_ranks(tensor),
            "_EXPERT_MODEL_PARALLEL_RANKS": dist.get_process_group_ranks(experts),
            "_CONTEXT_PARALLEL_GLOBAL_RANKS": dist.get_process_group_ranks(self.group(x.cp, 0)),
            "_DATA_PARALLEL_GLOBAL_RANKS": [self.here],
            "_DATA_PARALLEL_GLOBAL_RANKS_WITH_CP": [self.here],
        }
        for name in vars(
            s
        ):  # what is left are groups of data parallelism: which parameters there are, they do not change
            if "_GROUP" in name and name.isupper() and not name.endswith("S") and name not in found:
                found[name] = alone
        for name, value in found.items():
            if hasattr(s, name):
                setattr(s, name, value)
        s.set_virtual_pipeline_model_parallel_world_size(x.vpp if x.vpp > 1 else None)
