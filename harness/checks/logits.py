"""The check `logits`: Megatron's logits in a layout against the golden."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from bridges import Layout
from bridges.providers.core_attention import zigzag_positions
from harness.checks.localise import first_difference, hf_activations
from harness.checks.outcome import Outcome
from harness.checks.subject import Bench
from harness.ranks import jobs
from harness.reference.compare import compare


def check_logits(bench: Bench) -> Outcome:
    """Megatron's logits in this layout, of the main model and of every head of multi-token prediction, on every replica,
    against the golden."""
    bench.check_fp32_attention()
    golden = bench.subject.golden
    expected = [golden.logits, *golden.mtp_logits]
    replicas = assemble(bench.forward(), bench.layout, (len(expected), *golden.logits.shape))
    # Head k has seen k tokens more: the last k places have no token to see.
    results = [
        (compare(torch.from_numpy(replica[k][:, : want.shape[1]]), want, golden.gate), k)
        for replica in replicas
        for k, want in enumerate(expected)
    ]
    worst, head = max(results, key=lambda result: result[0].value)
    detail = (f"multi-token prediction head {head}: " if head else "") + worst.detail
    if not all(result.ok for result, k in results if k == 0):
        detail += "; " + localise(bench)
    elif worst.ok and golden.mtp_logits:
        detail += f"; {len(golden.mtp_logits)} head(s) of multi-token prediction among them"
    compared = len(results) == bench.layout.dp * len(expected)
    return Outcome(worst.ok and compared, worst.value, golden.gate, "rel rms", detail)


def assemble(by_rank, layout: Layout, shape) -> list[np.ndarray]:
    """Whole logits [heads, batch, sequence, vocab], one for each data-parallel replica; padded vocabulary columns dropped.

    ValueError when Megatron made another number of heads.
    """
    heads, _, length, vocab = shape
    replicas = [np.full(shape, np.nan, np.float32) for _ in range(layout.dp)]
    for coords, local in by_rank:
        if local is not None:
            if len(local) != heads:
                raise ValueError(
                    f"Megatron made logits of {len(local)} heads; the golden has {heads}, the main one included"
                )
            columns = slice(coords.tp * local.shape[-1], min((coords.tp + 1) * local.shape[-1], vocab))
            rows = zigzag_positions(length // layout.cp, coords.cp, layout.cp).numpy()
            replicas[coords.dp][:, :, rows, columns] = local[..., : columns.stop - columns.start]
    return replicas


def localise(bench: Bench) -> str:
    """Which module is the first that differs from Hugging Face, in this layout."""
    subject = bench.subject
    expected = hf_activations(subject.reference, subject.golden.inputs)
    return first_difference(
        expected, gathered(bench, jobs.activations, subject.golden.inputs.numpy()), subject.golden.gate
    )


def gathered(bench: Bench, job: Callable[[np.ndarray], jobs.Recorded], inputs: np.ndarray) -> dict[str, np.ndarray]:
    """What ranks recorded of modules, put together: {module: [batch, sequence, width]}."""
    layout, length = bench.layout, inputs.shape[1]
    whole: dict[str, np.ndarray] = {}
    for coords, found in bench.run(job, inputs):
        if coords.dp:
            continue
        for name, local in found.items():
            positions = zigzag_positions(length // layout.cp, coords.cp, layout.cp).numpy()
            if layout.sp:
                positions = np.split(positions, layout.tp)[coords.tp]
            empty = np.full((*inputs.shape, local.shape[-1]), np.nan, np.float32)
            whole.setdefault(name, empty)[:, positions] = local
    return whole
