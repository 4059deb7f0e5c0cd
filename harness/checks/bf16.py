"""The check `bf16`: the model in bf16 in a layout, against Hugging Face's in fp32, with a tolerance that is measured.

Hugging Face's own model in bf16, with the same weights, says how far a right model may be: half of its tokens differ from
fp32 by less than some number, and half of Megatron's must not differ by more than `FACTOR` times that. Tokens for which
either model chooses other experts than fp32 does are compared with nobody, and counted in the report. What such a token
says reaches the rest of its sequence all the same, so there are many sequences: with the golden's four, one flip of a
first token moves the median by a factor of two.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import toy_models
from harness.checks.localise import hf_layers
from harness.checks.logits import assemble, gathered
from harness.checks.outcome import NotApplicable, Outcome
from harness.checks.subject import Bench, Subject
from harness.ranks import jobs

FACTOR = 1.5  # right models reach 1.14, in 254 cells on GPUs (docs/gpu.md)
SEQUENCES = 32
NO_KERNEL = "No dot product attention backend"  # Transformer Engine's words
Choices = dict[str, np.ndarray]


def check_bf16(bench: Bench) -> Outcome:
    """The median token's relative error over that of Hugging Face's own bf16 model; and not many more routed otherwise."""
    subject = bench.subject
    ids, (exact, chosen), (theirs, their_choices) = _references(subject)
    path = str(subject.source.path)
    bench.run(jobs.build, path, bench.layout, subject.bridge_key, torch.bfloat16)
    try:
        by_rank = bench.run(forward, ids)
        if missing := [answer for answer in by_rank if isinstance(answer, str)]:
            raise NotApplicable(f"Transformer Engine has no bf16 attention for this model in this layout: {missing[0]}")
        shape = (1 + len(subject.golden.mtp_logits), *exact.shape)
        replicas = assemble(by_rank, bench.layout, shape)
        our_choices = gathered(bench, jobs.choices, ids)
    finally:
        bench.built = bench.run(jobs.build, path, bench.layout, subject.bridge_key)  # the other checks are about fp32
    worst = max((token_errors(replica[0], exact) for replica in replicas), key=np.median)
    return judge(
        worst,
        token_errors(theirs, exact),
        otherwise(our_choices, chosen, worst.shape),
        otherwise(their_choices, chosen, worst.shape),
    )


def forward(ids: np.ndarray) -> Any:
    """On ranks: as jobs.forward, or the reason why Transformer Engine has no kernel for it."""
    try:
        return jobs.forward(ids)
    except ValueError as error:
        if NO_KERNEL not in str(error):
            raise
        return str(error).splitlines()[0]


def judge(ours: np.ndarray, theirs: np.ndarray, our_flips: np.ndarray, their_flips: np.ndarray) -> Outcome:
    """From the errors of tokens and which of them were routed otherwise, all [batch, sequence]."""
    kept = ~(our_flips | their_flips)
    tokens = kept.size
    text = f"{our_flips.sum()} of {tokens} tokens routed otherwise than in fp32 (Hugging Face in bf16: {their_flips.sum()})"
    if kept.sum() < tokens / 8:
        return Outcome(False, None, FACTOR, "ratio", f"too few tokens to compare: {text}")
    noise, value = float(np.median(theirs[kept])), float(np.median(ours[kept]))
    ratio = value / noise
    many = our_flips.sum() > FACTOR * their_flips.sum() + tokens / 16
    detail = f"median token off by {value:.2g}, Hugging Face in bf16 by {noise:.2g}; {text}"
    return Outcome(ratio <= FACTOR and not many, ratio, FACTOR, "x bf16 noise", ("too many: " if many else "") + detail)


def token_errors(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Relative error of each token's logits, [batch, sequence]."""
    return np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)


def otherwise(actual: Choices, expected: Choices, shape: tuple[int, ...]) -> np.ndarray:
    """Which tokens have other experts in some layer, bool [batch, sequence]. ValueError for other layers."""
    if actual.keys() != expected.keys():
        raise ValueError(f"routers of {sorted(actual)} against those of {sorted(expected)}")
    flips = [(actual[name] != expected[name]).any(-1) for name in expected]
    return np.any(flips, axis=0) if flips else np.zeros(shape, bool)


def hf_choices(model: torch.nn.Module, ids: torch.Tensor) -> tuple[np.ndarray, Choices]:
    """(logits, {router by its layer: 1 for each expert chosen [batch, sequence, experts]}) of a Hugging Face model."""
    found: Choices = {}

    def hook(name, experts):
        def save(module, args, kwargs):
            index = args[1] if len(args) > 1 else kwargs["top_k_index"]
            ones = torch.zeros(index.shape[0], experts).scatter_(1, index, 1.0)
            found[name] = ones.view(*ids.shape, experts).numpy()

        return save

    handles = []
    for i, layer in enumerate(hf_layers(model)):
        for name, module in layer.named_modules():
            if name.endswith(".experts") and hasattr(module, "num_experts"):
                save = hook(f"layers.{i}.router", module.num_experts)
                handles.append(module.register_forward_pre_hook(save, with_kwargs=True))
    try:
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits.float().numpy(), found


def sequences(subject: Subject) -> torch.Tensor:
    """Token ids [SEQUENCES, sequence]: the golden's and random ones."""
    golden = subject.golden
    count, length = SEQUENCES - len(golden.inputs), golden.inputs.shape[1]
    random = torch.randint(golden.logits.shape[-1], (count, length), generator=torch.Generator().manual_seed(0))
    return torch.cat([golden.inputs, random])


def _references(subject: Subject) -> tuple[np.ndarray, tuple[np.ndarray, Choices], tuple[np.ndarray, Choices]]:
    """The ids; logits and chosen experts of Hugging Face's model in fp32, and in bf16. Once a row."""
    if subject.bf16 is None:
        ids = sequences(subject)
        in_bf16 = toy_models.build(subject.row, dtype=torch.bfloat16)
        subject.bf16 = ids.numpy(), hf_choices(subject.reference, ids), hf_choices(in_bf16, ids)
    return subject.bf16
