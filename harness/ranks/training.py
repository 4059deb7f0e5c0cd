"""One training step on ranks: Megatron's schedule forward and backward, logits and finalised gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads

from bridges.conversion.transfer import box_view, destinations, is_writer
from bridges.conversion.views import Box
from harness.ranks import jobs


@dataclass(frozen=True)
class Trained:
    """What a rank has after a step: its logits, as jobs.forward gives them, and the gradients of the blocks that it would
    export, one after the other in fp32, with the place of each in the Hugging Face tensors."""

    coords: Any
    logits: np.ndarray | None
    gradients: np.ndarray
    boxes: list[tuple[str, Box]]


def backward(input_ids: np.ndarray, cotangent: np.ndarray) -> Trained:
    """A step whose gradients of the logits are `cotangent` (of harness.reference.gradients.cotangents). Parameters that need no
    gradient are left out."""
    this = jobs.current()
    provider: Any = this.provider
    tasks = this.bridge.get_conversion_tasks(this.chunks)
    wrapped: list[Any] = [
        DistributedDataParallel(provider, DistributedDataParallelConfig(), chunk) for chunk in this.chunks
    ]
    provider.finalize_model_grads_func = finalize_model_grads
    provider.mtp_loss_scaling_factor = 0.0  # Megatron adds a loss of its own for each head
    for chunk in wrapped:
        chunk.zero_grad_buffer()

    data = jobs.Microbatches.of(input_ids)
    coords, size = data.coords, len(data.tokens[0])
    whole = torch.from_numpy(cotangent).to(jobs.device()).roll(-coords.dp, 1)
    weights = whole[:, :, data.positions].split(size, dim=1)

    seen: dict[int, torch.Tensor] = {}  # microbatch -> [1 + heads, sequences, local sequence, local vocabulary]

    def step(logits, n):
        start = coords.tp * logits.size(-1)
        local = weights[n][..., start : start + logits.size(-1)]
        made.pop()  # the main model's once more, and before them its heads'
        heads = [one.transpose(0, 1) for one in made]
        made.clear()
        every = [logits, *heads]
        seen[n] = torch.stack([one.detach().float() for one in every])
        total = sum((one[..., : local.size(-1)] * part).sum() for one, part in zip(every, local, strict=True))
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
    logits = torch.cat([seen[n] for n in sorted(seen)], dim=1).roll(coords.dp, 1).cpu().numpy() if seen else None
    return Trained(coords, logits, torch.cat(pieces).cpu().numpy(), boxes)
