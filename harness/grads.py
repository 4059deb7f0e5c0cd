"""The check `grads`: one backward in a layout, its gradients under Hugging Face names against Hugging Face's autograd.

The backward starts from a fixed random cotangent on the logits and not from a loss: rows of vocabulary padding take part in
Megatron's softmax, so a cross-entropy would differ between layouts of a correct model.
"""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

import toy_models
from bridges.checkpoint import Checkpoint
from bridges.conversion import current_layout, live_export
from bridges.cpu_backend import zigzag_positions
from harness import jobs
from harness.checks import Bench, Outcome, Subject
from harness.compare import relative_rms

LIMIT = 1e-3  # relative RMS per tensor; correct models stay near 1e-6


def check_grads(bench: Bench) -> Outcome:
    """Every parameter's gradient, after Megatron's own finalisation, against Hugging Face's."""
    subject = bench.subject
    cotangent = _cotangent(subject)
    expected = hf_gradients(subject, cotangent)
    by_rank = bench.run(backward, subject.golden.inputs.numpy(), cotangent)
    actual, without = by_rank[0]
    wrong, worst, worst_name = [], 0.0, "(all exact)"
    for name in sorted({*expected, *actual}):
        if name not in actual or name not in expected:
            wrong.append(f"{name} has a gradient only in {'Hugging Face' if name in expected else 'Megatron'}")
            continue
        value = relative_rms(torch.from_numpy(actual[name]), expected[name])
        if not value <= worst:
            worst, worst_name = value, name
        if not value <= LIMIT:
            wrong.append(f"gradient of {name} is off by {value:.2g}")
    detail = "; ".join(wrong[:4]) + (f" (and {len(wrong) - 4} more)" if len(wrong) > 4 else "")
    counted = f"{len(expected)} gradients, worst {worst_name}"
    if without:
        counted += f"; without gradient by nature: {', '.join(without)}"
    return Outcome(not wrong and bool(expected), worst, LIMIT, "rel rms", detail or counted)


def _cotangent(subject: Subject) -> np.ndarray:
    shape = tuple(subject.golden.logits.shape)
    return toy_models.random_tensor(f"cotangent of {subject.row}", shape, kind="matrix")


def hf_gradients(subject: Subject, cotangent: np.ndarray) -> dict[str, torch.Tensor]:
    """Hugging Face's gradients under the names of the published checkpoint.

    Renaming and fusing are linear, so a model whose weights are the gradients is saved like any other.
    """
    if subject.gradients is None:
        model = toy_models.build(subject.row)
        logits = model(subject.golden.inputs, use_cache=False).logits
        (logits * torch.from_numpy(cotangent)).sum().backward()
        buffers = {name for name, _ in model.named_buffers()}
        for parameter in model.parameters():
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        with tempfile.TemporaryDirectory() as folder:
            toy_models.save(model, folder)
            with Checkpoint.open(folder) as saved:
                subject.gradients = {n: saved.view(n).clone() for n in saved.tensors if n not in buffers}
    return subject.gradients


# -- on ranks --------------------------------------------------------------------------------------------------------


def backward(input_ids: np.ndarray, cotangent: np.ndarray) -> tuple[dict[str, np.ndarray], list[str]]:
    """(gradients by Hugging Face name on rank 0, else {}; Hugging Face tensors that have none) of the current model."""
    this = jobs.current()
    provider: Any = this.provider
    layout, coords = current_layout(provider)
    tasks = this.bridge.get_conversion_tasks(this.chunks)
    wrapped: list[Any] = [
        DistributedDataParallel(provider, DistributedDataParallelConfig(), chunk) for chunk in this.chunks
    ]
    provider.finalize_model_grads_func = finalize_model_grads
    for chunk in wrapped:
        chunk.zero_grad_buffer()

    ids = torch.from_numpy(input_ids).roll(-coords.dp, 0)
    batch, length = ids.shape
    positions = zigzag_positions(length // layout.cp, coords.cp, layout.cp)
    size = max(batch // layout.pp, 1)
    tokens = ids[:, positions].split(size)
    weights = torch.from_numpy(cotangent).roll(-coords.dp, 0)[:, positions].split(size)
    position_ids = positions[None].expand(tokens[0].shape)

    def step(iterator, model):
        piece, weight = next(iterator)

        def loss(logits):
            start = coords.tp * logits.size(-1)
            local = weight[..., start : start + logits.size(-1)]
            # The schedule averages over microbatches; this is a sum.
            return (logits[..., : local.size(-1)] * local).sum() * len(tokens), {}

        return model(piece, position_ids, None), loss

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(list(zip(tokens, weights, strict=True))) for _ in wrapped],
        model=wrapped,
        num_microbatches=len(tokens),
        seq_length=length,
        micro_batch_size=tokens[0].shape[0],
        forward_only=False,
    )
    without = sorted({copy.hf for t in tasks if not t.tensor.requires_grad for copy in t.copies})
    for task in tasks:
        task.tensor = getattr(task.tensor, "main_grad", task.tensor)
    source = this.bridge.hf_pretrained.checkpoint
    shapes = {name: info.shape for name, info in source.tensors.items()}
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, without)
    without = sorted(set().union(*everyone))
    names = [name for name in source.tensors if name not in without]
    found = {n: g.numpy() for n, g in live_export(tasks, coords, names, shapes, lambda _: torch.float32, cpu=True)}
    return (found if torch.distributed.get_rank() == 0 else {}), without
