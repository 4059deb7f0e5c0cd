"""The check `config`: the config survives the way to Megatron and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

import toy_models
from bridges import config_fields
from bridges.config_reads import Seen, reads
from harness.checks.outcome import Outcome
from harness.checks.subject import Bench, Subject
from harness.reference.compare import relative_rms


def check_config(bench: Bench) -> Outcome:
    """HF config -> provider -> HF config through disk: every field that the reference's class reads says the same, and a
    model built from the regenerated config alone computes the golden's logits.

    Which fields count is recorded from the reference; what the bridge says of it is not asked. A row with a stand-in
    reference compares its published fields as well.
    """
    subject = bench.subject
    auto = subject.auto_bridge
    original = subject.source.config
    provider = auto.to_megatron_provider(load_weights=False)
    regenerated = {
        **{
            k: v for k, v in original.items() if k in config_fields.MACHINERY
        },  # no model has them, so they are carried over
        **json.loads(json.dumps(type(auto._model_bridge).megatron_to_hf_config(provider))),
    }
    before, after = (toy_models.hf_config(subject.row, config) for config in (original, regenerated))
    before.architectures = after.architectures = [type(subject.reference).__name__]
    wrong, count = _differences(before, after)
    wrong += _unsayable(original, regenerated, before, after)
    if reads(auto.hf_pretrained.config) is None:
        wrong += _published_differences(original, regenerated, auto._model_bridge.HF_INERT)
    model = type(subject.reference)._from_config(after, attn_implementation="eager")
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
        "; ".join(wrong) or f"{count} fields say the same, logits differ by {value:.1e}{_unread(subject)}",
    )


def _differences(before: PreTrainedConfig, after: PreTrainedConfig) -> tuple[list[str], int]:
    """(what differs, how many fields were compared): what the class reads under either config."""
    seen = {id(config): reads(config) for config in (before, after)}
    if None in seen.values():
        raise ValueError(f"transformers' class for {before.model_type} does not run on the meta device")
    names = {name for one in seen.values() if one for name in one.names if "." not in name}
    fields = sorted((names & {*before.to_dict(), *after.to_dict()}) - config_fields.MACHINERY)

    def value(config: PreTrainedConfig, name: str) -> Any:
        return meant(name, getattr(Seen(config, seen[id(config)]), name, None), config.to_dict())  # type: ignore[arg-type]

    return [
        f"{name}: {value(after, name)!r} should be {value(before, name)!r}"
        for name in fields
        if value(before, name) != value(after, name)
    ], len(fields)


def meant(name: str, value: Any, config: Mapping[str, Any]) -> Any:
    """Return what a field says: a head dim that is not stated is an even share of the hidden size, and without a window its
    pattern over layers says nothing."""
    if name == "sliding_window_pattern" and config.get("sliding_window") is None:
        return None
    if name == "head_dim" and value is None:
        return config["hidden_size"] // config["num_attention_heads"]
    return value


def _unsayable(original: dict, regenerated: dict, before: PreTrainedConfig, after: PreTrainedConfig) -> list[str]:
    """Fields of the regenerated config that say something new where nobody reads it: no config says what the provider
    is."""
    reader, names = config_fields.unread(after, regenerated)
    same, seen = {**before.to_dict(), **original}, reads(after)
    nested = {name.rpartition(".")[2] for name in seen.names if "." in name} if seen else set()
    return [
        f"{name}: {regenerated[name]!r} is not read by {reader}, so that its config cannot say it"
        for name in names
        if name not in nested and regenerated[name] is not False and regenerated[name] != same.get(name)
    ]


def _published_differences(original: dict, regenerated: dict, inert: frozenset[str]) -> list[str]:
    """Where the model's own code has no class here, all of its fields are compared but the library's, and the length of a
    window that is switched off."""
    if original.get("use_sliding_window") is False:
        inert |= {"sliding_window"}
    return [
        f"{name}: {regenerated.get(name)!r} should be {value!r} (as published)"
        for name, value in sorted(original.items())
        if meant(name, regenerated.get(name), regenerated) != value
        and name not in inert
        and not config_fields.of_the_library(name, value)
    ]


def _unread(subject: Subject) -> str:
    pretrained = subject.auto_bridge.hf_pretrained
    reader, names = subject.auto_bridge._model_bridge.unread_fields(pretrained.config, pretrained.raw)
    return f"; not read by {reader}: {', '.join(names)}" if names else ""


def _logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits
