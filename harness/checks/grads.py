"""The check `grads`: one backward in a layout, its gradients under Hugging Face names against Hugging Face's autograd."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from bridges.conversion.transfer import box_view
from bridges.conversion.views import Box
from harness.checks.outcome import NotApplicable, Outcome, first_few
from harness.checks.subject import Bench, Subject
from harness.reference.compare import relative_rms
from harness.reference.gradients import compare_fingerprints, hf_gradients


def check_grads(bench: Bench) -> Outcome:
    """Every parameter's gradient, after Megatron's own finalisation, against Hugging Face's, and Hugging Face's against the
    golden's fingerprints. The value is the worst tensor's relative RMS."""
    bench.check_fp32_attention()
    if reason := bench.no_training:
        raise NotApplicable(reason)
    subject, golden = bench.subject, bench.subject.golden
    expected, wrong = _reference(subject)
    shapes = subject.auto_bridge.mapped_shapes(subject.source)
    actual = assemble([(t.gradients, t.boxes) for t in bench.trained], shapes)

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
    detail = first_few(wrong)
    counted = f"{len(expected)} gradients, worst {worst_name}"
    if zero:
        counted += f"; {zero} are zero (experts that no token chose)"
    if without := [name for name in shapes if name not in expected]:
        counted += f"; without gradient by nature: {', '.join(without)}"
    ok = not wrong and len(expected) > zero
    return Outcome(ok, worst, golden.gradient_gate, "rel rms", detail or counted)


def _reference(subject: Subject) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Hugging Face's gradients and where they differ from the golden's fingerprints; once a row."""
    if subject.gradients is None:
        golden = subject.golden
        found = hf_gradients(subject.row, subject.reference, golden.inputs, subject.cotangent)
        subject.gradients = found, compare_fingerprints(found, golden.tensors["gradients"], golden.gradient_gate)
    return subject.gradients


def assemble(
    by_rank: Iterable[tuple[np.ndarray, list[tuple[str, Box]]]], shapes: dict[str, tuple[int, ...]]
) -> dict[str, torch.Tensor]:
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
