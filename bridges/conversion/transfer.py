"""Copies applied to real tensors: import from files, export into files."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from bridges.checkpoints.reader import Checkpoint
from bridges.conversion.exact import exporting, importing
from bridges.conversion.mapping import REPLICATED
from bridges.conversion.plan import Copy, PlanError
from bridges.conversion.tasks import ConversionTask
from bridges.conversion.views import Box
from bridges.layout import Coords

Progress = Callable[[str], None]


def box_view(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """The block of a contiguous tensor that a box describes, as a view.

    Raises PlanError for a tensor whose memory is not plainly its values: a strided view, or a subclass that computes them.
    """
    plain = tensor.detach()
    if type(plain) is not torch.Tensor:
        raise PlanError(
            f"a {type(plain).__name__} of {list(tensor.shape)} is no plain tensor: a view of it would be of a temporary copy; "
            "convert with parameters in a plain dtype (for Transformer Engine: without fp8 parameters)"
        )
    if not plain.is_contiguous():
        raise PlanError(
            f"a tensor of {list(tensor.shape)} with strides {list(plain.stride())} is not contiguous: its blocks are not "
            "where the plan says; make it contiguous()"
        )
    return plain.as_strided(box.sizes, box.strides, tensor.storage_offset() + box.offset)


@torch.no_grad()
def import_weights(
    tasks: Iterable[ConversionTask], source: Checkpoint, *, lossy: bool = False, progress: Progress | None = None
) -> None:
    """HF files -> this rank's tensors; only the pages a rank keeps are read. Vocabulary padding becomes zero.

    Raises PlanError, naming all, for tensors whose values a parameter's dtype cannot hold, unless `lossy`.
    """
    exact = importing(lossy=lossy)
    for task in tasks:
        if task.mapping.padded:
            task.tensor.zero_()
        for copy in task.copies:
            block = box_view(source.view(copy.hf), copy.hf_box)
            exact.copy(copy.hf, box_view(task.tensor, copy.megatron_box), block)
        for copy, again in task.repeats:
            same = [box_view(source.view(name), copy.hf_box) for name in (copy.hf, again)]
            if not torch.equal(*same):
                raise PlanError(
                    f"{again} differs from {copy.hf}, of which it should be a copy, and Megatron holds one of them: "
                    "remove it from the checkpoint (a head: or set tie_word_embeddings to false)"
                )
        if progress:
            progress(task.param_name)
    exact.check()


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
    *,
    lossy: bool = False,
) -> None:
    """This rank's tensors -> `view(hf name)`, the blocks it is the writer of.

    Raises PlanError, naming all, for tensors whose values the file's dtype cannot hold, unless `lossy`.
    """
    exact = exporting(lossy=lossy)
    for task in tasks:
        if is_writer(task, coords):
            for copy, name in destinations(task):
                exact.copy(name, box_view(view(name), copy.hf_box), box_view(task.tensor, copy.megatron_box))
        if progress:
            progress(task.param_name)
    exact.check()
