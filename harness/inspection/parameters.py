"""How many parameters a model has, by part: Hugging Face's class says it, built on the meta device."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from bridges.config_reads import model_class
from harness.inspection.signs import EXPERTS
from harness.inspection.source import Source

CHOSEN = ("num_experts_per_tok", "moe_k", "top_k_experts", "moe_topk")
ROUTED = re.compile(r"\.experts\b")


@dataclass(frozen=True)
class Parameters:
    """{part: elements}, of the layers together; `active`: without the experts that a token does not visit."""

    parts: dict[str, int]
    total: int
    active: int
    counted_by: str


def build(source: Source) -> PreTrainedModel | None:
    """Return the model on the meta device; None where transformers has no class for it.

    Raises whatever the class does with a config that it cannot be built from.
    """
    if source.config is None or (kind := class_of(source.config)) is None:
        return None
    config = copy.deepcopy(source.config)
    if (getattr(config, "pad_token_id", None) or 0) >= getattr(config, "vocab_size", 1 << 62):
        config.pad_token_id = None  # torch refuses it
    with torch.device("meta"):
        return kind._from_config(config)


def class_of(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Return transformers' class, found by the architecture, or by the config's own class where the file names it otherwise
    (code that came with the model before transformers had it)."""
    found: Any = model_class(config)
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModel):
        found = found or auto._model_mapping.get(type(config), None)
    return found


def count(model: PreTrainedModel, fields: dict[str, Any], megatron: dict[str, int]) -> Parameters:
    """Return the parameters of a model by part; a tied head is counted once. Those of multi-token prediction, which
    transformers leaves out, are Megatron's."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}  # each parameter once
    mtp = {name: size for name, size in megatron.items() if name.startswith("mtp.")}
    more = ", MTP layers from the bridge" if mtp else ""
    return by_part({**sizes, **mtp}, fields, f"transformers' {type(model).__name__}{more}")


def by_part(sizes: dict[str, int], fields: dict[str, Any], counted_by: str) -> Parameters:
    """Return {parameter: elements} summed up by part, with the share of routed experts that a token visits."""
    parts: dict[str, int] = {}
    routed = 0
    for name, size in sizes.items():
        part = part_of(name)
        parts[part] = parts.get(part, 0) + size
        routed += size if ROUTED.search(name) else 0
    total = sum(sizes.values())
    return Parameters(parts, total, total - round(routed * (1 - _visited(fields))), counted_by)


def part_of(name: str) -> str:
    """Return the part of a parameter: `layers.self_attn`, `layers.mlp.experts`, `embed_tokens`, `visual.blocks.attn`."""
    words = re.sub(r"\.\d+\.", ".*.", name.removeprefix("model.")).split(".")
    if "*" not in words:
        return ".".join(words[:-1]) or name
    at = words.index("*")
    inner = words[at + 1 : -1] or words[at + 1 :]
    depth = 2 if len(inner) > 1 and re.search(r"expert|gate$|router", inner[1]) else 1
    part = ".".join([*words[:at], *inner[:depth]])
    return re.sub(r"[^.]*norm[^.]*$", "norms", part)


def _visited(fields: dict[str, Any]) -> float:
    """The share of the routed experts that a token visits."""
    experts, chosen = (next((fields[n] for n in names if fields.get(n)), None) for names in (EXPERTS, CHOSEN))
    return chosen / experts if isinstance(experts, int) and isinstance(chosen, int) else 1.0
