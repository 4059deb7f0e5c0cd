"""The check `grads`: one backward in a layout, its gradients under Hugging Face names against Hugging Face's autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads

from bridges.conversion import box_view, current_layout, destinations, is_writer
from bridges.views import Box
from harness import jobs
from harness.checks import Bench, NotApplicable, Outcome, Subject
from harness.compare import relative_rms
from harness.gradients import compare_fingerprints, cotangents, hf_gradients

Blocks = tuple[np.ndarray, list[tuple[str, Box]]]


def check_grads(bench: Bench) -> Outcome:
    """Every parameter's gradient, after Megatron's own finalisation, against Hugging Face's, and Hugging Face's against the
    golden's fingerprints. The value is the worst tensor's relative RMS."""
    bench.check_fp32_attention()
    subject, layout = bench.subject, bench.layout
    provider = subject.auto_bridge.to_megatron_provider(load_weights=False)
    if provider.num_moe_experts and layout.tp > 1 and not layout.sp:
        raise NotApplicable(
            "Megatron-Core refuses to train experts under tensor parallelism without sequence parallelism"
        )
    golden = subject.golden
    weights = cotangents(subject.row, [golden.logits, *golden.mtp_logits])
    expected, wrong = _reference(subject, weights)
    shapes = {name: info.shape for name, info in subject.source.tensors.items()}
    actual = assemble(bench.run(backward, golden.inputs.numpy(), weights.numpy()), shapes)

    wrong, worst, worst_name, zero = list(wrong), 0.0, "(all exact)", 0
    for name in sorted({*expected, *actual}):
        if name not in actual or name not in expected:
            wrong.append(f"{name} has a gradient only in {'Hugging Face' if name in expected else 'Megatron'}")
            continue
        if unwritten := int(actual[name].isnan().sum()):
            wrong.append(f"{unwritten} of {actual[name].numel()} elements of {name} have no number for a gradient")
        value = relative_rms(actual[name], expected[name])
        zero += not expected[name].any()
        if not value <= worst:
            worst, worst_name = value, name
        if not value <= golden.gradient_gate:
            wrong.append(f"gradient of {name} is off by {value:.2g}")
    detail = "; ".join(wrong[:4]) + (f" (and {len(wrong) - 4} more)" if len(wrong) > 4 else "")
    counted = f"{len(expected)} gradients, worst {worst_name}"
    if zero:
        counted += f"; {zero} are zero (experts that no token chose)"
    if without := [name for name in shapes if name not in expected]:
        counted += f"; without gradient by nature: {', '.join(without)}"
    ok = not wrong and len(expected) > zero
    return Outcome(ok, worst, golden.gradient_gate, "rel rms", detail or counted)


def _reference(subject: Subject, weights: torch.Tensor) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Hugging Face's gradients and where they differ from the golden's fingerprints; once a row."""
    if subject.gradients is None:
        golden = subject.golden
        found = hf_gradients(subject.row, subject.reference, golden.inputs, weights)
        subject.gradients = found, compare_fingerprints(found, golden.tensors["gradients"], golden.gradient_gate)
    return subject.gradients


def assemble(by_rank: list[Blocks], shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Whole gradients from every rank's blocks; NaN where no rank had one."""
    whole: dict[str, torch.Tensor] = {}
    for flat, boxes in by_rank:
        values, start = torch.from_numpy(flat), 0
        for name, box in boxes:
            if name not in whole:
                whole[name] = torch.full(shapes[name], torch.nan)
            view = box_view(whole[name], box)
            view.copy_(values[start : start + view.numel()].view(view.shape))
            start += view.numel()
    return whole


# -- on ranks --------------------------------------------------------------------------------------------------------


def backward(input_ids: np.ndarray, cotangent: np.ndarray) -> Blocks:
    """The finalised gradients of the blocks that this rank would export, one after the other in fp32, and the place of
    each in the Hugging Face tensors. Parameters that need no gradient are left out. `cotangent`: of `cotangents`."""
    this = jobs.current()
    provider: Any = this.provider
    _, coords = current_layout(provider)
    tasks = this.bridge.get_conversion_tasks(this.chunks)
    wrapped: list[Any] = [
        DistributedDataParallel(provider, DistributedDataParallelConfig(), chunk) for chunk in this.chunks
    ]
    provider.finalize_model_grads_func = finalize_model_grads
    provider.mtp_loss_scaling_factor = 0.0  # Megatron adds a loss of its own for each head
    for chunk in wrapped:
        chunk.zero_grad_buffer()

    data = jobs.Microbatches.of(input_ids)
    size = len(data.tokens[0])
    whole = torch.from_numpy(cotangent).to(jobs.device()).roll(-coords.dp, 1)
    weights = whole[:, :, data.positions].split(size, dim=1)

    def step(logits, n):
        start = coords.tp * logits.size(-1)
        local = weights[n][..., start : start + logits.size(-1)]
        made.pop()  # the main model's once more, and before them its heads'
        heads = [one.transpose(0, 1) for one in made]
        made.clear()
        total = sum(
            (one[..., : local.size(-1)] * part).sum() for one, part in zip([logits, *heads], local, strict=True)
        )
        # The schedule averages over microbatches; this is a sum.
        return total * len(data.tokens), {}

    with jobs.recorded_heads(this.chunks) as made:
        data.run(wrapped, step, forward_only=False)
    pieces, boxes = [torch.empty(0, device=jobs.device())], []
    for task in tasks:
        if task.tensor.requires_grad and is_writer(task, coords):
            grad: Any = task.tensor.main_grad  # type: ignore[attr-defined]
            for copy, name in destinations(task):
                pieces.append(box_view(grad, copy.megatron_box).float().reshape(-1))
                boxes.append((name, copy.hf_box))
    return torch.cat(pieces).cpu().numpy(), boxes
