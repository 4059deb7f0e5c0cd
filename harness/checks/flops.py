"""The check `flops`: what the formulas say for `hardware` is what the dispatcher counts on the real model, to the integer.

Forward and backward apart, part by part and layer by layer, summed over the ranks of a layout.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np

from bridges.conversion.walk import walk_of
from harness.checks.outcome import Outcome, first_few
from harness.checks.subject import Bench, Subject
from harness.flops.counter import Counted, counting
from harness.flops.model import flops
from harness.flops.run import Part
from harness.ranks import jobs, training

# Module inside a layer (and operation, where a module's own code does several things) -> part.
PARTS: tuple[tuple[str, str], ...] = (
    (r"self_attention\.linear_qkv", "qkv"),
    (r"self_attention\.core_attention", "core_attention"),
    (r"self_attention\.linear_proj", "o_proj"),
    (r"self_attention\.linear_q_proj", "mla_q_proj"),
    (r"self_attention\.linear_q_down_proj", "mla_q_down"),
    (r"self_attention\.linear_q_up_proj", "mla_q_up"),
    (r"self_attention\.linear_kv_down_proj", "mla_kv_down"),
    (r"self_attention\.linear_kv_up_proj", "mla_kv_up"),
    (r"self_attention\.in_proj", "gdn_in_proj"),
    (r"self_attention(\.conv1d)? aten\.convolution(_backward)?", "gdn_conv"),
    (r"self_attention aten\.bmm", "gdn_recurrence"),
    (r"self_attention\.out_proj", "gdn_out_proj"),
    (r"mlp\.linear_fc[12]", "dense_mlp"),
    (r"mlp\.router", "router"),
    (r"mlp\.experts\.linear_fc[12]", "experts"),
    (r"mlp\.shared_experts\.linear_fc[12]", "shared_experts"),
    (r"mlp\.shared_experts aten\.mm", "shared_expert_gate"),
    (r"mlp\.fc1_latent_proj", "moe_latent_down"),
    (r"mlp\.fc2_latent_proj", "moe_latent_up"),
)
# One module, the output layer, computes all of these.
HEAD = ("logits", "logits_padding", "mtp_head", "mtp_head_padding")

Table = dict[tuple[str, str], tuple[int, int]]  # (place, part) -> (forward, backward)


def place_and_part(counted: Counted, layer_numbers: dict[str, int], output: str) -> tuple[str, str]:
    """Where a counted operation belongs. Raises RuntimeError for a module that is no part.

    `layer_numbers`: path of a decoder layer's module -> its number in the whole model, from 0;
    `output`: path of the output layer.
    """
    chunk, _, path = counted.module.partition(".")
    if path == output:
        return "output", "logits"
    if match := re.fullmatch(r"mtp\.layers\.(\d+)\.eh_proj", path):
        return f"mtp.{match[1]}", "mtp_proj"
    if match := re.fullmatch(r"mtp\.layers\.(\d+)\.mtp_model_layer\.(.+)", path):
        place, inside = f"mtp.{match[1]}", match[2]
    elif (match := re.fullmatch(r"(.+?\.\d+)\.(.+)", path)) and f"{chunk}.{match[1]}" in layer_numbers:
        place, inside = f"layers.{layer_numbers[f'{chunk}.{match[1]}']}", match[2]
    else:
        raise RuntimeError(f"{counted.flops} FLOPs of {counted.op} in module {path or '(none)'!r} belong to no part")
    for pattern, part in PARTS:
        if re.fullmatch(pattern, inside) or re.fullmatch(pattern, f"{inside} {counted.op}"):
            return place, part
    raise RuntimeError(f"{counted.flops} FLOPs of {counted.op} in module {path} belong to no part: add it to PARTS")


def cotangent_of(subject: Subject) -> np.ndarray:
    """Ones on the logits of the model and of its heads of multi-token prediction: their values change no count."""
    golden = subject.golden
    return np.ones((1 + len(golden.mtp_logits), *golden.logits.shape), np.float32)


def count_on_rank(input_ids: np.ndarray, cotangent: np.ndarray) -> tuple[Table, dict[str, int]]:
    """A forward and backward of the current model, counted: the table, and corrections to torch's own count by operation."""
    chunks = jobs.current().chunks
    numbers = {
        f"{i}.{layer.path}": layer.number
        for i, chunk in enumerate(chunks)
        for layer in walk_of(chunk.config).layers(chunk)
    }
    with counting({str(i): chunk for i, chunk in enumerate(chunks)}) as counter:
        training.backward(input_ids, cotangent)
    table: Table = {}
    walk = walk_of(jobs.current().provider)
    for one in counter.counted:
        key = place_and_part(one, numbers, walk.model + walk.output)
        forward, backward = table.get(key, (0, 0))
        table[key] = (forward, backward + one.flops) if one.backward else (forward + one.flops, backward)
    return table, dict(counter.corrections)


def expected_table(parts: tuple[Part, ...], *, tp: int, sp: bool, replicas: int) -> Table:
    """What all ranks together should do: every part as often as it is replicated, for each data-parallel replica."""
    table: Table = {}
    for part in parts:
        key = ("output", "logits") if part.name in HEAD else (part.place, part.name)
        times = replicas * part.copies(tp, sp)
        forward, backward = table.get(key, (0, 0))
        table[key] = (forward + times * part.forward, backward + times * part.backward)
    return table


def differences(expected: Table, actual: Table) -> list[str]:
    """One line for each part of each layer whose forward or backward differs."""
    lines = []
    for key in sorted({*expected, *actual}):
        for direction, want, have in zip(
            ("forward", "backward"), expected.get(key, (0, 0)), actual.get(key, (0, 0)), strict=True
        ):
            if want != have:
                lines.append(f"{key[0]} {key[1]} {direction}: {want} by formula, {have} counted")
    return lines


def check_flops(bench: Bench) -> Outcome:
    """Formulas against the dispatcher; the value is the sum of all differences in FLOPs, and its limit is 0."""
    subject, layout = bench.subject, bench.layout
    provider: Any = subject.auto_bridge.to_megatron_provider(load_weights=False).apply_layout(layout).finalize()
    batch, length = subject.golden.inputs.shape
    by_formula = flops(provider, seq=length, batch=batch, convention="hardware", kernels="torch")
    expected = expected_table(by_formula.parts, tp=layout.tp, sp=layout.sp, replicas=layout.dp)

    actual: Table = {}
    corrections: Counter[str] = Counter()
    for table, corrected in bench.run(count_on_rank, subject.golden.inputs.numpy(), cotangent_of(subject)):
        corrections.update(corrected)
        for key, (forward, backward) in table.items():
            before = actual.get(key, (0, 0))
            actual[key] = (before[0] + forward, before[1] + backward)

    wrong = differences(expected, actual)
    off = sum(
        abs(want - have)
        for key in {*expected, *actual}
        for want, have in zip(expected.get(key, (0, 0)), actual.get(key, (0, 0)), strict=True)
    )
    once = by_formula.total * layout.dp
    total = sum(f + b for f, b in expected.values())
    copied = sorted({p.name for p in by_formula.parts if p.copies(layout.tp, layout.sp) > 1})
    detail = first_few(wrong)
    counted = f"{total} FLOPs in {len(expected)} parts"
    if copied:
        counted += f", {total - once} of them replicated: {', '.join(copied)}"
    if corrections:
        counted += "; torch's count corrected: " + ", ".join(f"{op} {by:+d}" for op, by in corrections.items())
    return Outcome(not wrong and bool(actual), float(off), 0.0, "FLOPs", detail or counted)
