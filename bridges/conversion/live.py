"""Live export: whole Hugging Face tensors one by one on every rank, fed by collectives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from bridges.checkpoints.reader import Checkpoint
from bridges.conversion.agreement import of_all_ranks
from bridges.conversion.exact import exporting
from bridges.conversion.plan import Copy, PlanError
from bridges.conversion.tasks import ConversionTask
from bridges.conversion.transfer import box_view, destinations, is_writer
from bridges.layout import Coords


@torch.no_grad()
def live_export(
    tasks: Sequence[ConversionTask],
    coords: Coords,
    source: Checkpoint,
    ignored: set[str],
    *,
    cpu: bool,
    lossy: bool = False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """(hf name, whole tensor) one by one on every rank, fed by collectives: for weight synchronisation. Names, shapes and
    dtypes are the source's, and so are the values of what is `ignored`.

    Writers fill their blocks of a zero tensor and the bytes are summed over all ranks, which is exact since every byte
    but one is zero. All ranks must consume the iterator together. Raises PlanError before the first tensor, on every rank,
    when values would be narrowed, unless `lossy`.
    """
    _check_exact(tasks, coords, source, lossy=lossy)
    writers: dict[str, list[tuple[torch.Tensor, Copy]]] = {}
    for task in tasks:
        if is_writer(task, coords):
            for copy, name in destinations(task):
                writers.setdefault(name, []).append((task.tensor, copy))
    # A pipeline stage may hold nothing, and takes part in the sums all the same.
    device = tasks[0].tensor.device if tasks else torch.device("cuda" if torch.cuda.is_available() else "cpu")
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


def _check_exact(tasks: Sequence[ConversionTask], coords: Coords, source: Checkpoint, *, lossy: bool) -> None:
    """Raise on every rank what any rank finds: one alone would leave the others waiting in a sum."""
    exact, error = exporting(lossy=lossy), None
    try:
        for task in filter(lambda task: is_writer(task, coords), tasks):
            for copy, name in destinations(task):
                dtype = source.tensors[name].dtype
                exact.check_kinds(name, task.tensor.dtype, dtype)
                if dtype != task.tensor.dtype:
                    values = box_view(task.tensor, copy.megatron_box)
                    exact.note(name, values.to(dtype), values)
        exact.check()
    except PlanError as caught:
        error = caught
    for one in of_all_ranks(error):
        if one is not None:
            raise one
