"""The check `config`: the config survives the way to Megatron and back."""

from __future__ import annotations

import json

import torch

import toy_models
from harness.checks.outcome import Outcome
from harness.checks.subject import Bench
from harness.reference.compare import relative_rms


def check_config(bench: Bench) -> Outcome:
    """HF config -> provider -> HF config through disk: every field of the original says the same, and a model built from
    the regenerated config alone computes the golden's logits."""
    subject = bench.subject
    auto = subject.auto_bridge
    provider = auto.to_megatron_provider(load_weights=False)
    original, inert = subject.source.config, auto._model_bridge.HF_INERT - {"model_type", "architectures"}
    regenerated = {
        **{k: v for k, v in original.items() if k in inert | set(auto._model_bridge.HF_FIXED)},  # carried over
        **json.loads(json.dumps(type(auto._model_bridge).megatron_to_hf_config(provider))),
    }
    before, after = (toy_models.hf_config(subject.row, c).to_dict() for c in (original, regenerated))
    fields = [f for f in sorted({*before, *after}) if f not in inert]
    wrong = [f"{f}: {after.get(f)!r} should be {before.get(f)!r}" for f in fields if before.get(f) != after.get(f)]
    config = toy_models.hf_config(subject.row, regenerated)
    model = type(subject.reference)._from_config(config, attn_implementation="eager")
    try:
        model.load_state_dict(subject.reference.state_dict(), strict=True)
    except RuntimeError as error:
        return Outcome(False, len(wrong) or 1, 0, "fields", "; ".join(wrong) or str(error).splitlines()[0])
    value = relative_rms(_logits(model.eval(), subject.golden.inputs), subject.golden.logits)
    if not value <= subject.golden.gate:
        wrong.append(f"a model of the regenerated config has other logits (relative RMS {value:.2g})")
    return Outcome(
        not wrong,
        len(wrong),
        0,
        "fields",
        "; ".join(wrong) or f"{len(fields)} fields say the same, logits differ by {value:.1e}",
    )


def _logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits
