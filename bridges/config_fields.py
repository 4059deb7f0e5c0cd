"""Is every field of a config accounted for? Which of its fields count, which no table knows, which nobody reads.

What counts is what transformers' class reads (bridges.config_reads). For a model that transformers has no class for, every
field counts but those of the library itself.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from bridges.config_reads import ConfigError, Reads, Seen, reads

# Read by transformers' machinery or in training only; no value of theirs changes the logits (a test changes them all).
MACHINERY = frozenset(
    {
        "chunk_size_feed_forward",
        "_attn_implementation",
        "_experts_implementation",
        "gradient_checkpointing",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "return_dict",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "use_cache",
    }
)
# How weights are stored: another number of bytes, the same computation.
STORAGE = frozenset({"quantization_config", "compression_config"})
# What a config.json says about its file, its tokenizer or its code.
BOOKKEEPING = frozenset(
    {
        "_attn_implementation_autoset",
        "_model_name_or_path",
        "_name_or_path",
        "attn_implementation",
        "auto_map",
        "default_theta",
        "is_decoder",
        "is_llama_config",
        "max_sequence_length",
        "max_window_layers",
        "model_type",
        "num_labels",
        "pretraining_tp",
        "router_z_loss_coef",
        "tokenizer_class",
        "torchscript",
        "transformers.js_config",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
    }
)


@cache
def _library_fields() -> frozenset[str]:
    return frozenset({*PreTrainedConfig().to_dict(), *STORAGE, *BOOKKEEPING, *MACHINERY}) | {
        "bos_token_id",
        "eos_token_id",
    }


def of_the_library(name: str, value: Any) -> bool:
    """Is this a field of every config, or a generation setting at its default, as old versions wrote them all down?"""
    defaults = GenerationConfig._get_default_generation_params()
    return (
        name in _library_fields()
        or (name in defaults and value in (defaults[name], None))
        or name.endswith("_token_id")
    )


def unread(
    config: PreTrainedConfig, raw: Mapping[str, Any] | None, used: Collection[str] = ()
) -> tuple[str, list[str]]:
    """(the class, the fields of config.json that it does not read and that reach nothing it reads): `max_window_layers`
    becomes `layer_types`, so it counts, and so do those that are `used` otherwise. ("", []) where transformers has no class."""
    if raw is None or (seen := reads(config)) is None:
        return "", []
    left = [
        name
        for name, value in raw.items()
        if value is not None
        and name not in (*used, *MACHINERY)
        and name not in seen
        and not of_the_library(name, value)
    ]
    return seen.reader, sorted(name for name in left if not _reaches(name, config, raw, seen))


def _reaches(name: str, config: PreTrainedConfig, raw: Mapping[str, Any], seen: Reads) -> bool:
    """Does the config's own __init__ make a field that is read out of this one?"""
    before = _read_part(config, seen)
    others = [{key: value for key, value in raw.items() if key != name}, {**raw, name: another(raw[name])}]
    for other in others:
        try:
            after = type(config).from_dict(copy.deepcopy(other))  # transformers writes into nested dicts
        except Exception:  # the config looks at the field
            return True
        if _read_part(after, seen) != before:
            return True
    return False


def _read_part(config: PreTrainedConfig, seen: Reads) -> dict[str, Any]:
    """The fields that are read, with the keys of dicts that are."""
    view = Seen(config, seen)
    return {name: getattr(view, name) for name in config.to_dict() if name in seen}


def another(value: Any) -> Any:
    """A value of the same type that says something else; what cannot be changed stays."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value * 1.5 + 0.25
        case list():
            return value[::-1] if value != value[::-1] else value[:-1]
    return value


@dataclass(frozen=True)
class Accounts:
    """What tables leave open: fields that are `missing`, {field: (value, the one that is built)} of the `refused`, {field:
    value} of the `unknown`."""

    missing: list[str]
    refused: dict[str, tuple[Any, Any]]
    unknown: dict[str, Any]


def accounts(
    config: PreTrainedConfig,
    raw: Mapping[str, Any] | None,
    *,
    known: Collection[str],
    fixed: Mapping[str, Any],
    required: Collection[str] = (),
    inert: Collection[str] = (),
) -> Accounts:
    """Return the fields for which tables do not account; arguments as in `check`."""
    seen = reads(config)
    names = {*known, *(config.attribute_map.get(name, name) for name in known)}
    values = {**flat(config), **(raw or {})}
    found = Accounts([] if seen else sorted(name for name in required if values.get(name) is None), {}, {})
    for name, value in sorted(values.items()):
        if value is None or not _counts(name, value, seen, inert):
            continue
        if name in fixed:
            if value != fixed[name]:
                found.refused[name] = (value, fixed[name])
        elif name not in names and not (name.endswith("bias") and value is False):
            # Without a bias there is no such tensor; one that is there all the same is refused on import.
            found.unknown[name] = value
    return found


def check(
    config: PreTrainedConfig,
    raw: Mapping[str, Any] | None,
    *,
    bridge: str,
    known: Collection[str],
    fixed: Mapping[str, Any],
    required: Collection[str],
    inert: Collection[str],
) -> None:
    """ConfigError that names every field of `config` and of the file's own `raw` for which `bridge` does not account: it
    knows what `known` names and builds one value of each in `fixed`. Where transformers has no class, the bridge's word is
    taken for which fields must be there (`required`) and which change nothing (`inert`)."""
    seen = reads(config)
    found = accounts(config, raw, known=known, fixed=fixed, required=required, inert=inert)
    problems = []
    if found.missing:
        problems.append(f"{_named(found.missing)} missing: only the model's own code knows its default")
    for name, (value, built) in found.refused.items():
        problems.append(f"config field {name} = {value!r}: {bridge} computes only {name} = {built!r}")
    if found.unknown:
        by = f", which {seen.reader} reads," if seen else ""
        listed = [f"{name} = {value!r}" for name, value in found.unknown.items()]
        problems.append(f"{_named(listed, by)} not known to {bridge}: map in CONFIG_MAPPING or a rule")
    if problems:
        raise ConfigError("; ".join(problems))


def _counts(name: str, value: Any, seen: Reads | None, inert: Collection[str]) -> bool:
    if seen:
        return name in seen and name not in MACHINERY
    return name not in inert and not of_the_library(name, value)


def _named(names: list[str], by: str = "") -> str:
    one = len(names) == 1
    return f"config field{'' if one else 's'} {', '.join(names)}{by} {'is' if one else 'are'}"


def flat(config: PreTrainedConfig) -> dict[str, Any]:
    """{field: value}, those of nested configs under dotted names (`text_config.hidden_size`)."""
    fields: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        nested = getattr(config, name, None)
        if isinstance(nested, PreTrainedConfig):
            fields |= {f"{name}.{inner}": v for inner, v in flat(nested).items()}
        else:
            fields[name] = value
    return fields
