"""Multi-latent attention: the provider, its configuration rules and its mappings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig

from bridges.config_rules import Fields, Rule
from bridges.conversion.mapping import AutoMapping, ColumnParallelMapping, ParamMapping
from bridges.mechanisms.blocks import HF_LAYER, MEGATRON_LAYER
from bridges.providers.provider import GPTModelProvider


@dataclass
class MLAModelProvider(GPTModelProvider, MLATransformerConfig):  # type: ignore[misc]
    """A decoder whose keys and values come from a latent of `kv_lora_rank` channels, queries from one of `q_lora_rank`
    (None: straight from the hidden state). Each head has `qk_head_dim` channels without rope, `qk_pos_emb_head_dim`
    with, and `v_head_dim` of values."""

    multi_latent_attention: bool = True
    q_lora_rank: int | None = None  # type: ignore[assignment]
    qk_layernorm: bool = True
    rope_type: str = "rope"
    latent_norm_epsilon: float | None = None  # None: layernorm_epsilon
    rotary_base: float = 10000.0

    def finalize(self) -> MLAModelProvider:
        if not self._final:
            self.num_query_groups = self.num_attention_heads
        super().finalize()
        return self

    def edit_layer(self, spec: Any) -> None:
        super().edit_layer(spec)
        if spec.submodules.self_attention.module is MLASelfAttention:
            spec.submodules.self_attention.module = _MLASelfAttention

    def provide(self, *args, **kwargs) -> GPTModel:
        model = super().provide(*args, **kwargs)
        if self.latent_norm_epsilon is not None:
            for name, module in model.named_modules():
                if name.endswith((".linear_q_up_proj", ".linear_kv_up_proj")):
                    module.eps = self.latent_norm_epsilon  # type: ignore[assignment]
        return model

    def rope_frequencies(self) -> torch.Tensor | None:
        """None: every attention layer has Megatron's own rotary module, plain or yarn, which agree with Hugging Face's."""
        return None


class _MLASelfAttention(MLASelfAttention):
    """Without a query latent Megatron 0.19 puts a norm in front of the query projection that no published model has; here
    it is the projection that the layer spec asks for."""

    def _resolve_qk_norm_config(self, submodules: Any) -> Any:
        found = super()._resolve_qk_norm_config(submodules)
        if self.config.q_lora_rank is None:
            found["linear_q_proj"] = submodules.linear_q_proj or found["linear_q_proj"]
        return found


CONFIG_MAPPING = [
    ("kv_lora_rank", "kv_lora_rank"),
    ("qk_nope_head_dim", "qk_head_dim"),
    ("qk_rope_head_dim", "qk_pos_emb_head_dim"),
    ("v_head_dim", "v_head_dim"),
]

_YARN = {
    "factor": "rotary_scaling_factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}

# What the general rope rule reads, and the old name of rope_type.
_GENERAL = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def rope(yarn: str = "yarn", *, plain: bool = True) -> Rule:
    """Plain or yarn, which scales the softmax by mscale_all_dim, and cos and sin by the ratio of mscale to it. `yarn` is
    what the family calls it; without `plain` it must be there. The general rope rule runs first and gives the base; this
    one reads the scaling."""

    def to_megatron(config) -> Fields:
        scaling = dict(getattr(config, "rope_parameters", None) or {})
        kind = scaling.get("rope_type", "default")
        if (percent := scaling.get("partial_rotary_factor") or 1.0) != 1.0:
            raise ValueError(f"partial_rotary_factor {percent} is not built for multi-latent attention")
        if kind == "default" and not plain:
            raise ValueError("rope_scaling is missing: only the model's own code knows its default")
        if kind == "default":
            return {"rope_type": "rope", "rotary_scaling_factor": 1.0, "mscale_all_dim": 0.0}
        if kind != yarn:
            raise ValueError(f"rope_type {kind!r} is not built for multi-latent attention; known: default, {yarn}")
        if missing := [k for k in ("mscale", "mscale_all_dim") if not scaling.get(k)]:
            raise ValueError(f"rope_scaling of type yarn without {' and '.join(missing)} is not built")
        if more := sorted(k for k, v in scaling.items() if k not in (*_YARN, *_GENERAL) and v is not None):
            raise ValueError(f"rope_scaling with {', '.join(more)} is not built for multi-latent attention")
        return {"rope_type": "yarn", **{m: scaling[hf] for hf, m in _YARN.items() if hf in scaling}}

    def to_hf(provider) -> Fields:
        if provider.rope_type == "rope":
            return {"rope_scaling": None}
        return {"rope_scaling": {"rope_type": yarn, **{hf: getattr(provider, m) for hf, m in _YARN.items()}}}

    return Rule(("rope_scaling",), to_megatron, to_hf)


# Heads are counted once in this attention; transformers' head_dim is the rotated part, which has its own field.
HEADS = Rule(
    ("num_key_value_heads", "head_dim", "qk_head_dim"),
    lambda c: {"num_query_groups": c.num_attention_heads, "kv_channels": c.v_head_dim},
    lambda p: {"num_key_value_heads": p.num_attention_heads, "head_dim": p.qk_pos_emb_head_dim},
)


Q_LORA = Rule(  # null is a value: queries straight from the hidden state
    ("q_lora_rank",),
    lambda c: {"q_lora_rank": getattr(c, "q_lora_rank", None)},
    lambda p: {"q_lora_rank": p.q_lora_rank},
)

RULES = (rope(), HEADS, Q_LORA)


def attention(*, layer: str = HF_LAYER) -> list[ParamMapping]:
    m, a = f"{MEGATRON_LAYER}.self_attention", f"{layer}.self_attn"
    return [
        AutoMapping(f"{MEGATRON_LAYER}.input_layernorm.weight", f"{layer}.input_layernorm.weight"),
        AutoMapping(f"{m}.linear_q_proj.weight", f"{a}.q_proj.weight"),
        AutoMapping(f"{m}.linear_q_down_proj.weight", f"{a}.q_a_proj.weight"),
        AutoMapping(f"{m}.linear_q_up_proj.layer_norm_weight", f"{a}.q_a_layernorm.weight"),
        ColumnParallelMapping(f"{m}.linear_q_up_proj.weight", f"{a}.q_b_proj.weight"),
        AutoMapping(f"{m}.linear_kv_down_proj.weight", f"{a}.kv_a_proj_with_mqa.weight"),
        AutoMapping(f"{m}.linear_kv_up_proj.layer_norm_weight", f"{a}.kv_a_layernorm.weight"),
        ColumnParallelMapping(f"{m}.linear_kv_up_proj.weight", f"{a}.kv_b_proj.weight"),
        AutoMapping(f"{m}.linear_proj.weight", f"{a}.o_proj.weight"),
    ]
