"""Wrong bridges, checkpoints and goldens: the checks that must see each one are red and say where, the rest stay green.

A check listed as blind is not a fault of that check: an error made both on import and on export cannot show in
a round trip. It is written down so that nobody takes a green round trip for a proof.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import toy_models
from bridges import AutoMapping, Mapping, MegatronModelBridge, Part, auto_bridge, config_rules
from bridges.families.llama import LlamaBridge
from bridges.families.mistral import MistralBridge, MixtralBridge
from bridges.families.qwen2 import Qwen2Bridge, Qwen2MoeBridge
from bridges.families.qwen3 import Qwen3Bridge, Qwen3MoeBridge
from bridges.families.smollm3 import SmolLM3Bridge
from bridges.mapping import Resolved
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file

from harness import goldens
from harness.report import Cell
from harness.verify import verify

CHECKS = ("config", "complete", "roundtrip", "logits", "reload")
Bridge = type[MegatronModelBridge]


# Ways to break a bridge. Each gives a subclass; nothing is registered.


def with_mappings(bridge: Bridge, change: Callable[[list[Mapping]], Iterable[Mapping]]) -> Bridge:
    """Its declarations as `change` makes them from the right ones."""

    class Mutant(bridge):
        def mapping_registry(self):
            registry = super().mapping_registry()
            return type(registry)(*change(registry.mappings))

    return Mutant


def renamed(bridge: Bridge, names: dict[str, str]) -> Bridge:
    """Every Hugging Face name has these words replaced; import and export stay each other's inverse."""
    pattern = re.compile("|".join(map(re.escape, names)))

    def change(mappings):
        for mapping in mappings:
            mapping.parts = tuple(
                Part(pattern.sub(lambda m: names[m[0]], p.hf), p.view) for p in mapping.parts
            )
        return mappings

    return with_mappings(bridge, change)


def swapped(bridge: Bridge, a: str, b: str) -> Bridge:
    return renamed(bridge, {a: b, b: a})


def replaced(bridge: Bridge, *new: Mapping) -> Bridge:
    """Other declarations for the Megatron parameters of `new`."""
    names = {m.megatron_param for m in new}
    return with_mappings(bridge, lambda old: [*(m for m in old if m.megatron_param not in names), *new])


def without(bridge: Bridge, megatron_param: str) -> Bridge:
    """One declaration left out."""
    return with_mappings(bridge, lambda old: [m for m in old if m.megatron_param != megatron_param])


def with_fields(bridge: Bridge, **fields) -> Bridge:
    """Provider fields fixed, whatever config.json says."""

    class Mutant(bridge):
        @classmethod
        def hf_config_to_provider_kwargs(cls, config):
            return {**super().hf_config_to_provider_kwargs(config), **fields}

    return Mutant


def with_rule(bridge: Bridge, old: config_rules.Rule, **changes) -> Bridge:
    """One of its two-way config rules changed."""
    rules = tuple(dataclasses.replace(r, **changes) if r is old else r for r in bridge.CONFIG_RULES)
    assert rules != bridge.CONFIG_RULES
    return type("Mutant", (bridge,), {"CONFIG_RULES": rules})


def exporting(bridge: Bridge, **fields: Callable) -> Bridge:
    """config.json fields computed from the provider in another way."""

    class Mutant(bridge):
        @classmethod
        def megatron_to_hf_config(cls, provider):
            config = super().megatron_to_hf_config(provider)
            return {**config, **{name: value(provider) for name, value in fields.items()}}

    return Mutant


def ignoring(bridge: Bridge, *patterns: str) -> Bridge:
    """Tensors that no mapping reads are waved through."""
    return type("Mutant", (bridge,), {"IGNORED_TENSORS": dict.fromkeys(patterns, "the mutant looks away")})


class Rotated(Mapping):
    """On real ranks of a layout with `axis` > 1, the number (layer or expert) in HF names is rotated by `by`.

    Import and export agree, and what is derived from shapes alone never sees it.
    """

    def __init__(self, mapping: Mapping, axis: str, by: int, wildcard: int, count: int):
        self.__dict__.update(mapping.__dict__)
        self.axis, self.by, self.wildcard, self.count = axis, by, wildcard, count

    def resolve(self, wildcards) -> tuple[Resolved, ...]:
        size = {
            "ep": parallel_state.get_expert_model_parallel_world_size,
            "pp": parallel_state.get_pipeline_model_parallel_world_size,
        }[self.axis]
        numbers = list(wildcards)
        if parallel_state.model_parallel_is_initialized() and size() > 1:
            numbers[self.wildcard] = str((int(numbers[self.wildcard]) + self.by) % self.count)
        return super().resolve(numbers)


def rotated(bridge: Bridge, axis: str, by: int, wildcard: int, count: int, where: str) -> Bridge:
    return with_mappings(
        bridge,
        lambda old: [
            Rotated(m, axis, by, wildcard, count) if where in m.megatron_param else m for m in old
        ],
    )


# The table.

ANYTHING = r"."


@dataclass(frozen=True)
class Mutant:
    """`caught`: {check: what its detail must match} in the last of `layouts`. All other checks must be green there,
    and every check in the layouts before. `everywhere`: the import refuses it, so no check can run."""

    name: str
    bridge: Bridge
    row: str
    caught: dict[str, str]
    layouts: tuple[str, ...] = ("tp1",)


def everywhere(words: str) -> dict[str, str]:
    return dict.fromkeys(CHECKS, words)


ATTENTION = r"first to differ: layers\.0\.self_attention"
MLP = r"first to differ: layers\.0\.mlp"
FC1 = "decoder.layers.*.mlp.linear_fc1.weight"
GATE, UP = "model.layers.*.mlp.gate_proj.weight", "model.layers.*.mlp.up_proj.weight"
FC2 = "decoder.layers.*.mlp.experts.linear_fc2.weight*"

CUT_EVENLY = replaced(LlamaBridge, Mapping(FC1, (Part(GATE, "f h -> ; f ; h"), Part(UP, "f h -> ; f ; h"))))
TRANSPOSED = replaced(
    MixtralBridge,
    Mapping(
        FC2,
        (Part("model.layers.*.block_sparse_moe.experts.*.w2.weight", "(t i) o -> t ; o ; i"),),
        sharding="row",
    ),
)

WINDOW_OFF_BY_ONE = {
    "to_megatron": lambda c: {"window_size": (c.sliding_window, 0)},
    "to_hf": lambda p: {"sliding_window": p.window_size[0]},
}
NO_ROPE_INVERTED = {
    "to_megatron": lambda c: {"no_rope_freq": list(c.no_rope_layers)},
    "to_hf": lambda p: {"no_rope_layers": list(p.no_rope_freq)},
}
BIASES = [f"model.layers.*.self_attn.{p}_proj.bias" for p in "qkv"]
NO_BIAS = with_fields(Qwen2Bridge, add_qkv_bias=False)
NO_SHARED_GATE = with_fields(Qwen2MoeBridge, moe_shared_expert_gate=False)
TWO_NORMS = AutoMapping("decoder.layers.*.mlp.linear_fc1.layer_norm_weight", "model.layers.*.input_layernorm.weight")

MUTANTS = [
    # Tensors in the wrong place, on import and on export alike: bytes come home unchanged.
    Mutant("q-k-swapped", swapped(LlamaBridge, "q_proj", "k_proj"), "llama2", {"logits": ATTENTION}),
    Mutant("k-v-swapped", swapped(LlamaBridge, "k_proj", "v_proj"), "llama3", {"logits": ATTENTION}),
    Mutant("gate-up-swapped", swapped(LlamaBridge, "gate_proj", "up_proj"), "llama3", {"logits": MLP}),
    Mutant("norms-swapped", swapped(LlamaBridge, "input_layernorm", "post_attention_layernorm"), "llama3", {"logits": ATTENTION}),
    Mutant("q-k-norms-swapped", swapped(Qwen3Bridge, "q_norm", "k_norm"), "qwen3", {"logits": ATTENTION}),
    Mutant("cut-evenly-tp1", CUT_EVENLY, "llama3", {}),
    Mutant("cut-evenly-tp2", CUT_EVENLY, "llama3", {"logits": MLP}, ("tp2",)),
    Mutant("cut-evenly-tp1-tp2", CUT_EVENLY, "llama3", {"logits": MLP, "roundtrip": "linear_fc1"}, ("tp1", "tp2",)),
    Mutant("experts-ep2", rotated(MixtralBridge, "ep", 4, 1, 8, ".experts."), "mixtral", {"logits": MLP}, ("ep2",)),
    Mutant("experts-tp1-ep2", rotated(MixtralBridge, "ep", 4, 1, 8, ".experts."), "mixtral", {"logits": MLP, "roundtrip": "experts"}, ("tp1", "ep2",)),
    Mutant("layers-pp2", rotated(LlamaBridge, "pp", 4, 0, 8, "decoder.layers"), "llama3", {"logits": ATTENTION}, ("pp2",)),
    Mutant("layers-tp1-pp2", rotated(LlamaBridge, "pp", 4, 0, 8, "decoder.layers"), "llama3", {"logits": ATTENTION, "roundtrip": "decoder.layers"}, ("tp1", "pp2",)),
    Mutant("transposed-square", TRANSPOSED, "mixtral-square", {"logits": MLP}),
    Mutant("transposed-square-etp2", TRANSPOSED, "mixtral-square", {"logits": MLP}, ("tp2",)),
    Mutant("transposed", TRANSPOSED, "mixtral", everywhere("experts.0.w2")),
    Mutant("drop", without(LlamaBridge, "decoder.final_layernorm.weight"), "llama3", everywhere("decoder.final_layernorm")),
    Mutant("two-norms", replaced(LlamaBridge, TWO_NORMS), "llama3", everywhere("post_attention_layernorm")),
    Mutant("two-norms-ignoring", ignoring(replaced(LlamaBridge, TWO_NORMS), "model.layers.*.post_attention_layernorm.weight"), "llama3", everywhere("post_attention_layernorm")),
    Mutant("buffer", type("M", (Qwen3MoeBridge,), {"MEGATRON_DEFAULTS": {**Qwen3MoeBridge.MEGATRON_DEFAULTS, "moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}}), "qwen3_moe", everywhere("expert_bias")),
    Mutant("bias", NO_BIAS, "qwen2", everywhere("q_proj.bias")),
    Mutant("bias-ignored", ignoring(NO_BIAS, *BIASES), "qwen2", everywhere("q_proj.bias")),
    Mutant("shared-gate", NO_SHARED_GATE, "qwen2_moe", everywhere("shared_expert_gate")),
    Mutant("shared-gate-ign", ignoring(NO_SHARED_GATE, "model.layers.*.mlp.shared_expert_gate.weight"), "qwen2_moe", everywhere("shared_expert_gate")),
    Mutant("theta", with_fields(LlamaBridge, rotary_base=10000.0), "llama3", {"config": "rope", "logits": ATTENTION}),
    Mutant("scaling", with_fields(LlamaBridge, rope_scaling=None), "llama3.1_ropescale", {"config": "rope", "logits": ATTENTION}),
    Mutant("partial", with_fields(LlamaBridge, rotary_percent=0.5), "llama3", {"config": "rope", "logits": ATTENTION}),
    Mutant("eps", with_fields(LlamaBridge, layernorm_epsilon=1e-5), "llama3", {"config": "rms_norm_eps", "logits": ATTENTION}),
    Mutant("window", with_rule(MistralBridge, config_rules.WINDOW, **WINDOW_OFF_BY_ONE), "mistral", {"logits": ATTENTION}),
    Mutant("window-export", exporting(MistralBridge, sliding_window=lambda p: p.window_size[0]), "mistral", {"config": "sliding_window"}),
    Mutant("window-ignored", with_fields(MistralBridge, window_size=None), "mistral", {"logits": ATTENTION}),
    Mutant("norope", with_rule(SmolLM3Bridge, config_rules.NO_ROPE_LAYERS, **NO_ROPE_INVERTED), "smollm3", {"logits": ATTENTION}),
    Mutant("topk", with_fields(Qwen3MoeBridge, moe_router_pre_softmax=False), "qwen3_moe", {}),
    Mutant("topk-raw", with_fields(Qwen3MoeBridge, moe_router_pre_softmax=False), "qwen3_moe_raw", {"logits": MLP}),
    Mutant("maxpos", exporting(LlamaBridge, max_position_embeddings=lambda p: p.seq_length), "llama3", {"config": "max_pos"}),
    Mutant("padded-config", exporting(LlamaBridge, vocab_size=lambda p: p.padded_vocab_size), "llama3", {"reload": "embed"}, ("tp4",)),
    Mutant("untied", with_fields(LlamaBridge, share_embeddings_and_output_weights=False), "llama3.2_tied", everywhere("lm_head"), ("pp2",)),
    Mutant("gelu", with_fields(LlamaBridge, activation_func=torch.nn.functional.gelu), "llama3", {"logits": MLP}),
    Mutant("topk1", with_fields(MixtralBridge, moe_router_topk=1), "mixtral", {"logits": MLP}),
    Mutant("unknown-field", type("M", (LlamaBridge,), {"CONFIG_MAPPING": [p for p in LlamaBridge.CONFIG_MAPPING if p[0] != "rms_norm_eps"]}), "llama3", everywhere("rms_norm_eps")),
]


def run(row: str, bridge: Bridge | None, layouts=("tp1",), checks=CHECKS, folder=None) -> dict:
    """{(layout, check): cell}"""
    report = verify(row, bridge=bridge, layouts=list(layouts), checks=checks, folder=folder)
    return {(c.layout, c.check): c for c in report.cells}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_wrong_bridge_is_seen_and_located(mutant):
    """The checks that can see it are red, with a detail that names the place; those that cannot are green."""
    cells = run(mutant.row, mutant.bridge, mutant.layouts)
    for c in cells.values():
        print(mutant.name, c.layout, c.check, c.status, c.detail)
