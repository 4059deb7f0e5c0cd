"""The blocks that families are put together from: lists of mappings in Megatron's names, Hugging Face names given.

`layer` is the Hugging Face prefix of a decoder layer with its wildcard.
"""

from __future__ import annotations

from bridges.conversion.mapping import (
    ROW,
    AutoMapping,
    ConcatenatedGatedMLPMapping,
    ConcatenatedQKVMapping,
    GatedMLPMapping,
    ParamMapping,
    Part,
    QKVMapping,
)

MEGATRON_LAYER = "decoder.layers.*"
HF_LAYER = "model.layers.*"


def embeddings(
    *, embed: str = "model.embed_tokens", norm: str = "model.norm", head: str = "lm_head"
) -> list[ParamMapping]:
    return [
        AutoMapping("embedding.word_embeddings.weight", f"{embed}.weight"),
        *_norm("decoder.final_layernorm.", norm),
        AutoMapping("output_layer.weight", f"{head}.weight"),
    ]


def _norm(megatron: str, hf: str) -> list[ParamMapping]:
    """A norm's weight and, for the models that have it, its bias."""
    return [AutoMapping(f"{megatron}{kind}", f"{hf}.{kind}") for kind in ("weight", "bias")]


def linear(megatron: str, hf: str) -> list[ParamMapping]:
    """A linear's weight and, for the models that have it, its bias."""
    return [AutoMapping(f"{megatron}.{kind}", f"{hf}.{kind}") for kind in ("weight", "bias")]


def attention(
    *,
    layer: str = HF_LAYER,
    norm: str = "input_layernorm",
    block: str = "self_attn",
    qkv: str | None = None,
    qk_norm: tuple[str, str] = ("q_norm", "k_norm"),
    output: str = "o_proj",
) -> list[ParamMapping]:
    """Grouped-query attention with its norm; biases and q/k norms are mapped for the models that have them. `qkv` names
    one tensor of all queries, keys and values."""
    m, a = f"{MEGATRON_LAYER}.self_attention", f"{layer}.{block}"
    mappings = [
        *_norm(f"{m}.linear_qkv.layer_norm_", f"{layer}.{norm}"),
        *_norm(f"{MEGATRON_LAYER}.input_layernorm.", f"{layer}.{norm}"),
    ]
    for kind in ("weight", "bias"):
        if qkv:
            mappings.append(ConcatenatedQKVMapping(f"{m}.linear_qkv.{kind}", f"{a}.{qkv}.{kind}"))
        else:
            mappings.append(
                QKVMapping(
                    f"{m}.linear_qkv.{kind}", q=f"{a}.q_proj.{kind}", k=f"{a}.k_proj.{kind}", v=f"{a}.v_proj.{kind}"
                )
            )
    return [
        *mappings,
        AutoMapping(f"{m}.q_layernorm.weight", f"{a}.{qk_norm[0]}.weight"),
        AutoMapping(f"{m}.k_layernorm.weight", f"{a}.{qk_norm[1]}.weight"),
        *linear(f"{m}.linear_proj", f"{a}.{output}"),
    ]


def gated_mlp(
    *, layer: str = HF_LAYER, norm: str = "post_attention_layernorm", gate_up: str | None = None
) -> list[ParamMapping]:
    """A dense feed-forward block with its norm; `gate_up` names one tensor of both matrices."""
    m = f"{MEGATRON_LAYER}.mlp"
    mappings = _norm(f"{m}.linear_fc1.layer_norm_", f"{layer}.{norm}")
    for kind in ("weight", "bias"):
        fc1 = f"{m}.linear_fc1.{kind}"
        if gate_up:
            mappings.append(ConcatenatedGatedMLPMapping(fc1, f"{layer}.mlp.{gate_up}.{kind}"))
        else:
            gate, up = f"{layer}.mlp.gate_proj.{kind}", f"{layer}.mlp.up_proj.{kind}"
            mappings.append(GatedMLPMapping(fc1, gate=gate, up=up))
    return [*mappings, *linear(f"{m}.linear_fc2", f"{layer}.mlp.down_proj")]


def plain_mlp(
    *,
    layer: str = HF_LAYER,
    norm: str = "post_attention_layernorm",
    names: tuple[str, str] = ("up_proj", "down_proj"),
) -> list[ParamMapping]:
    """A dense feed-forward block of two matrices, with its norm."""
    m = f"{MEGATRON_LAYER}.mlp"
    return [
        *_norm(f"{m}.linear_fc1.layer_norm_", f"{layer}.{norm}"),
        *linear(f"{m}.linear_fc1", f"{layer}.mlp.{names[0]}"),
        *linear(f"{m}.linear_fc2", f"{layer}.mlp.{names[1]}"),
    ]


def moe(
    *,
    layer: str = HF_LAYER,
    norm: str = "post_attention_layernorm",
    block: str = "mlp",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    router: str = "gate",
    expert_bias: str | None = None,
    shared: str | None = None,
    shared_gate: str | None = None,
) -> list[ParamMapping]:
    """Routed experts, one tensor each on disk, with router and norm; shared experts where the family has them."""
    m, b = f"{MEGATRON_LAYER}.mlp", f"{layer}.{block}"
    gate, up, down = names
    mappings: list[ParamMapping] = [
        AutoMapping(f"{MEGATRON_LAYER}.pre_mlp_layernorm.weight", f"{layer}.{norm}.weight"),
        AutoMapping(f"{m}.router.weight", f"{b}.{router}.weight"),
        *([AutoMapping(f"{m}.router.expert_bias", f"{b}.{expert_bias}")] if expert_bias else []),
        GatedMLPMapping(
            f"{m}.experts.linear_fc1.weight*", gate=f"{b}.experts.*.{gate}.weight", up=f"{b}.experts.*.{up}.weight"
        ),
        AutoMapping(f"{m}.experts.linear_fc2.weight*", f"{b}.experts.*.{down}.weight"),
    ]
    if shared:
        s = f"{m}.shared_experts"
        mappings += [
            GatedMLPMapping(
                f"{s}.linear_fc1.weight", gate=f"{b}.{shared}.gate_proj.weight", up=f"{b}.{shared}.up_proj.weight"
            ),
            AutoMapping(f"{s}.linear_fc2.weight", f"{b}.{shared}.down_proj.weight"),
        ]
    if shared_gate:
        mappings.append(AutoMapping(f"{m}.shared_experts.gate_weight", f"{b}.{shared_gate}.weight"))
    return mappings


def fused_experts(
    *, layer: str = HF_LAYER, gate_up: str = "mlp.experts.gate_up_proj", down: str = "mlp.experts.down_proj"
) -> list[ParamMapping]:
    """Routed experts in two tensors for all of them: `gate_up` [E, gate and up, in], `down` [E, out, in]."""
    m, gate_up, down = f"{MEGATRON_LAYER}.mlp.experts", f"{layer}.{gate_up}", f"{layer}.{down}"
    return [
        ParamMapping(
            f"{m}.linear_fc1.weight*",
            (
                Part(gate_up, "e ([*t f | t f]) h -> t ; f ; h"),
                Part(gate_up, "e ([t f | *t f]) h -> t ; f ; h"),
            ),
        ),
        ParamMapping(f"{m}.linear_fc2.weight*", (Part(down, "e o (t i) -> t ; o ; i"),), sharding=ROW),
    ]


def either(*forms: list[ParamMapping]) -> list[ParamMapping]:
    """Forms in which checkpoints of a family come, the published one first; a checkpoint's tensor names decide."""
    variants = [mapping for form in forms for mapping in form]
    for mapping in variants:
        mapping.variant = True
    return variants
