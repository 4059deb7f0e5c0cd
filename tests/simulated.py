"""All ranks of a layout in one process: their tasks are made and run by the product's own functions, on plain tensors.

Nothing here knows how a conversion is done. Only what Megatron's process groups would tell a rank (its layout and its
coordinates, the sum over all ranks) is given by hand. Functions are looked up in their modules when they are called, so
that a test may replace any of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from bridges.conversion import live, tasks, transfer
from bridges.conversion.mapping import MegatronMappingRegistry
from bridges.layout import Coords, Layout

Tensors = dict[str, torch.Tensor]
Held = Callable[[Coords], Iterable[tuple[str, torch.Tensor]]]


class Source:
    """A checkpoint in memory, as far as imports and live exports look at one."""

    def __init__(self, tensors: Tensors):
        self._tensors = tensors
        self.tensors = {n: SimpleNamespace(dtype=t.dtype, shape=tuple(t.shape)) for n, t in tensors.items()}
        self.path = "memory"

    def view(self, name: str) -> torch.Tensor:
        return self._tensors[name]


@dataclass
class Rank:
    coords: Coords
    tasks: list[Any]

    @property
    def tensors(self) -> Tensors:
        return {task.param_name: task.tensor for task in self.tasks}


def poison(shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of NaN that does not begin where its storage does, as parameters in Megatron's buffers do not."""
    shape = tuple(shape)
    storage = torch.full((7 + torch.Size(shape).numel(),), float("nan"), dtype=dtype)
    return storage[7:].view(shape)


def ranks(
    layout: Layout,
    registry: MegatronMappingRegistry,
    shapes: Mapping[str, tuple[int, ...]],
    provider: Any,
    held: Held,
    repeated: Mapping[str, str],
) -> list[Rank]:
    """Every rank of a layout with the tasks that `build_tasks` makes for it. `held(coords)` yields a rank's parameters."""
    found = []
    for number in range(layout.world_size):
        coords = layout.coords(number)
        with (
            mock.patch.object(tasks, "current_layout", lambda provider, at=coords: (layout, at)),
            mock.patch.object(tasks, "global_tensors", lambda chunks, at=coords: held(at)),
        ):
            found.append(Rank(coords, tasks.build_tasks([], registry, dict(shapes), provider, dict(repeated))))
    return found


def imported(world: list[Rank], source: Any, **options: Any) -> None:
    for rank in world:
        transfer.import_weights(rank.tasks, source, **options)


def exported(world: list[Rank], source: Any) -> tuple[Tensors, dict[str, torch.Tensor]]:
    """({tensor: what the ranks wrote}, {tensor: how many ranks wrote each element}), in the dtypes of the source."""
    whole = {n: torch.full(i.shape, float("nan"), dtype=i.dtype) for n, i in source.tensors.items()}
    times = {n: torch.zeros(i.shape, dtype=torch.int32) for n, i in source.tensors.items()}
    for rank in world:
        mine: Tensors = {}

        def view(name: str, mine: Tensors = mine) -> torch.Tensor:
            return mine.setdefault(name, torch.full_like(whole[name], float("nan")))

        transfer.export_weights(rank.tasks, rank.coords, view)
        for name, tensor in mine.items():
            wrote = ~tensor.isnan()
            whole[name][wrote] = tensor[wrote]
            times[name] += wrote
    return whole, times


def exported_live(world: list[Rank], source: Any, ignored: set[str] = frozenset()) -> list[list[tuple[str, Any]]]:  # type: ignore[assignment]
    """What each rank's live export yields; ranks are threads that meet in every sum."""
    results: list[Any] = [None] * len(world)
    with _summing(len(world)) as aborted:

        def one(number: int) -> None:
            rank = world[number]
            try:
                found = live.live_export(rank.tasks, rank.coords, source, ignored, cpu=True)
                results[number] = [(name, tensor.clone()) for name, tensor in found]
            except BaseException as error:
                results[number] = error
                aborted()

        threads = [threading.Thread(target=one, args=(number,)) for number in range(len(world))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, threading.BrokenBarrierError):
            raise result
    return results


@contextmanager
def _summing(size: int):
    """torch.distributed as live export sees it: a sum over all threads."""
    parts: list[torch.Tensor] = []
    total: list[torch.Tensor] = []
    barrier = threading.Barrier(size, timeout=20)
    lock = threading.Lock()

    def all_reduce(tensor: torch.Tensor) -> None:
        with lock:
            parts.append(tensor)
        if barrier.wait() == 0:
            total[:] = [torch.stack(parts).sum(0, dtype=torch.int64).to(tensor.dtype)]
            parts.clear()
        barrier.wait()
        tensor.copy_(total[0])
        barrier.wait()

    fake = SimpleNamespace(is_initialized=lambda: True, get_world_size=lambda: size, all_reduce=all_reduce)
    with mock.patch.object(live, "dist", fake):
        yield barrier.abort
