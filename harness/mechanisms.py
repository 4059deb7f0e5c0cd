"""What a model has, read from its provider and from no list of config fields."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import toy_models
from bridges import AutoBridge, GoldengateError, MegatronModelBridge, PreTrainedCausalLM
from bridges.hf_pretrained import load_config

MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_multiplier", "logits_divisor")
# Name -> does a provider have it? A new mechanism adds its line here.
TESTS: dict[str, Callable[[Any], Any]] = {
    "shared expert": lambda p: p.moe_shared_expert_intermediate_size,
    "sigmoid router": lambda p: p.num_moe_experts and p.moe_router_score_function == "sigmoid",
    "expert bias": lambda p: p.num_moe_experts and p.moe_router_enable_expert_bias,
    "expert groups": lambda p: p.num_moe_experts and p.moe_router_num_groups,
    "square experts": lambda p: p.num_moe_experts and p.moe_ffn_hidden_size == p.hidden_size,
    "MLA": lambda p: p.multi_latent_attention,
    "GDN": lambda p: p.experimental_attention_variant == "gated_delta_net",
    "gated attention": lambda p: p.attention_output_gate,
    "q/k norm": lambda p: p.qk_layernorm and not p.multi_latent_attention,
    "zero-centred norm": lambda p: p.layernorm_zero_centered_gamma,
    "attention bias": lambda p: p.add_qkv_bias or p.add_bias_linear,
    "sliding window": lambda p: p.window_size,
    "partial rotary": lambda p: not p.multi_latent_attention and p.rotary_percent != 1,
    "layers without rope": lambda p: p.no_rope_freq,
    "interleaved rope": lambda p: not p.multi_latent_attention and p.rotary_interleaved,
    "rope by layer type": lambda p: getattr(p, "rope_by_layer_type", None),
    "LayerNorm": lambda p: p.normalization == "LayerNorm",
    "norms behind blocks": lambda p: getattr(p, "post_norm", False),
    "no norms before blocks": lambda p: not getattr(p, "pre_norm", True),
    "q/k norm over all heads": lambda p: getattr(p, "whole_qk_norm", False),
    "q/k norm after rope": lambda p: getattr(p, "qk_norm_after_rope", False),
    "parallel blocks": lambda p: getattr(p, "parallel_blocks", False),
    "softcaps": lambda p: getattr(p, "attention_softcap", None) or getattr(p, "logits_softcap", None),
    "multipliers": lambda p: any(getattr(p, name, 1.0) != 1.0 for name in MULTIPLIERS),
    "MTP": lambda p: p.mtp_num_layers,
    "tied": lambda p: p.share_embeddings_and_output_weights,
}


def mechanisms(provider: Any) -> list[str]:
    """Return the names of what the provider's model has, "MoE" or "dense" first."""
    kind = (getattr(provider, "rope_scaling", None) or {}).get("rope_type", "default")
    if provider.multi_latent_attention:
        kind = {"rope": "default"}.get(provider.rope_type, provider.rope_type)
    rope = [] if kind == "default" else [f"rope {kind}"]
    return ["MoE" if provider.num_moe_experts else "dense", *(n for n, has in TESTS.items() if has(provider)), *rope]


def provider_of(row: str, bridge: type[MegatronModelBridge] | None = None) -> Any:
    """Return a row's provider, not finalized, made from its config alone.

    A family whose config does not say how deep its multi-token prediction is gets the depth of the row's own heads.
    """
    config = toy_models.config_dict(row)
    pretrained = PreTrainedCausalLM(load_config(config, Path(row), trusted=False), config)
    try:
        provider = AutoBridge(pretrained, bridge).to_megatron_provider(load_weights=False)
    except GoldengateError:
        if bridge is None:
            raise
        return provider_of(row)  # a bridge under test that cannot read the config fails in its cells
    if (spec := toy_models.mtp_spec(row)) and not provider.mtp_num_layers:
        provider.mtp_num_layers = spec["layers"]
    return provider


def sample(rows: Sequence[str]) -> list[str]:
    """Return few rows that have every mechanism of all between them, in the order given. The cheapest come first: of rows
    that add as much, the one with the fewest mechanisms beside."""
    has = {row: set(mechanisms(provider_of(row))) for row in rows}
    missing, chosen = set().union(*has.values()), []
    while missing:
        best = max(rows, key=lambda row: (len(has[row] & missing), -len(has[row])))
        chosen.append(best)
        missing -= has[best]
    return [row for row in rows if row in chosen]
