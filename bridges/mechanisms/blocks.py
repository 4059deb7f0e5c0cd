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
        AutoMapping("decoder.final_layernorm.weight", f"{norm}.weight"),
        AutoMapping("output_layer.weight", f"{head}.weight"),
    ]


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
    mappings: list[ParamMapping] = [AutoMapping(f"{m}.linear_qkv.layer_norm_weight", f"{layer}.{norm}.weight")]
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
        AutoMapping(f"{m}.linear_proj.weight", f"{a}.{output}.weight"),
    ]


def gated_mlp(
    *, layer: str = HF_LAYER, norm: str = "post_attention_layernorm", gate_up: str | None = None
) -> list[ParamMapping]:
    """A dense feed-forward block with its norm."""
    m = f"{MEGATRON_LAYER}.mlp"
    fc1 = (
        ConcatenatedGatedMLPMapping(f"{m}.linear_fc1.weight", f"{layer}.mlp.{gate_up}.weight")
        if gate_up
        else GatedMLPMapping(
            f"{m}.linear_fc1.weight", gate=f"{layer}.mlp.gate_proj.weight", up=f"{layer}.mlp.up_proj.weight"
        )
    )
    return [
        AutoMapping(f"{m}.linear_fc1.layer_norm_weight", f"{layer}.{norm}.weight"),
        fc1,
        AutoMapping(f"{m}.linear_fc2.weight", f"{layer}.mlp.down_proj.weight"),
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


def fused_experts(*, layer: str = HF_LAYER, block: str = "mlp") -> list[ParamMapping]:
    """Routed experts in two tensors for all of them: gate_up_proj [E, gate and up, in], down_proj [E, out, in]."""
    m, b = f"{MEGATRON_LAYER}.mlp.experts", f"{layer}.{block}.experts"
    gate_up, down = f"{b}.gate_up_proj", f"{b}.down_proj"
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
