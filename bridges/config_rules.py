"""Two-way rules between config.json fields and provider fields where one field does not simply become another.

A rule names the Hugging Face fields it accounts for and gives both directions; a family lists the rules it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

HF = Any  # a transformers config
Fields = dict[str, Any]


@dataclass(frozen=True)
class Rule:
    """`to_megatron(config)` gives provider fields, `to_hf(provider)` gives config fields; `hf` are those accounted for.

    A rule sees the fields that transformers' class reads; one that is `unread` sees all, because it is about what published
    checkpoints have and that class leaves out (multi-token prediction).
    """

    hf: tuple[str, ...]
    to_megatron: Callable[[HF], Fields]
    to_hf: Callable[[Any], Fields]
    unread: bool = False


def _get(config: HF, name: str, default: Any = None) -> Any:
    """A config field where an absent field and null both mean `default`."""
    value = getattr(config, name, None)
    return default if value is None else value


# -- rope ----------------------------------------------------------------------------------------------------------


def _rope_to_megatron(config: HF) -> Fields:
    parameters = dict(_get(config, "rope_parameters", {}))
    if parameters and all(isinstance(v, dict) for v in parameters.values()):
        used = set(config.layer_types)
        return {
            "rope_by_layer_type": {kind: dict(of) for kind, of in parameters.items() if kind in used},
            "rope_layer_types": list(config.layer_types),
        }
    base = parameters.pop("rope_theta", None) or _get(config, "rope_theta") or _get(config, "default_theta", 10000.0)
    percent = parameters.pop("partial_rotary_factor", None) or _get(config, "partial_rotary_factor", 1.0)
    scaling = None if parameters.get("rope_type", "default") == "default" else parameters
    return {"rotary_base": base, "rotary_percent": percent, "rope_scaling": scaling}


def _rope_to_hf(provider) -> Fields:
    if by_type := getattr(provider, "rope_by_layer_type", None):
        return {"rope_parameters": {kind: dict(of) for kind, of in by_type.items()}}
    fields = {"rope_theta": provider.rotary_base, "rope_scaling": provider.rope_scaling}
    return fields if provider.rotary_percent == 1.0 else {**fields, "partial_rotary_factor": provider.rotary_percent}


ROPE = Rule(("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"), _rope_to_megatron, _rope_to_hf)


# -- dtype, head dim -----------------------------------------------------------------------------------------------


def dtype_from_hf(config: HF, default: torch.dtype = torch.float32) -> torch.dtype:
    """The dtype that a config names (`dtype`, once `torch_dtype`); ValueError for one that torch does not have."""
    value = _get(config, "dtype", _get(config, "torch_dtype", default))
    if isinstance(value, str):
        found = getattr(torch, value.removeprefix("torch."), None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"config dtype {value!r} is not a torch dtype")
        value = found
    return value


DTYPE = Rule(
    ("dtype", "torch_dtype"),
    lambda c: {"params_dtype": (d := dtype_from_hf(c)), "bf16": d == torch.bfloat16, "fp16": d == torch.float16},
    lambda p: {"torch_dtype": str(p.params_dtype).removeprefix("torch.")},
)

HEAD_DIM = Rule(  # absent or null means an even share of the hidden size
    ("head_dim",),
    lambda c: {"kv_channels": _get(c, "head_dim", c.hidden_size // c.num_attention_heads)},
    lambda p: {} if p.kv_channels is None else {"head_dim": p.kv_channels},
)


# -- attention -----------------------------------------------------------------------------------------------------


def _window_to_megatron(config: HF) -> Fields:
    """HF counts the token itself in `sliding_window`; Megatron's window (w, 0) is w tokens before it."""
    window = _get(config, "sliding_window")
    if not window or _get(config, "use_sliding_window", True) is False:
        return {}
    fields: Fields = {"window_size": (window - 1, 0)}
    types = _get(config, "layer_types")
    if types and "full_attention" in types:
        fields["window_attn_skip_freq"] = [int(t == "sliding_attention") for t in types]
    return fields


def _window_to_hf(provider) -> Fields:
    if provider.window_size is None:
        return {"sliding_window": None, "use_sliding_window": False, "layer_types": None}
    freq = provider.window_attn_skip_freq
    types = [("full_attention", "sliding_attention")[f] for f in freq] if freq else None
    return {"sliding_window": provider.window_size[0] + 1, "use_sliding_window": True, "layer_types": types}


WINDOW = Rule(("sliding_window", "use_sliding_window", "layer_types"), _window_to_megatron, _window_to_hf)

NO_ROPE_WITHOUT_WINDOW = Rule(  # where a model has windows, its other layers have no rope; no field says so
    (),
    lambda c: (
        {"no_rope_freq": [int(t == "full_attention") for t in c.layer_types]} if _get(c, "sliding_window") else {}
    ),
    lambda p: {},
)

NO_ROPE_LAYERS = Rule(  # HF: 1 where the layer has rope; Megatron: 1 where it has none
    ("no_rope_layers", "no_rope_layer_interval"),
    lambda c: {"no_rope_freq": [1 - r for r in c.no_rope_layers]},
    lambda p: {"no_rope_layers": [1 - r for r in p.no_rope_freq]},
)


# -- experts -------------------------------------------------------------------------------------------------------

NORM_TOPK = Rule(  # renormalising the chosen probabilities is softmax over the chosen logits
    ("norm_topk_prob",),
    lambda c: {"moe_router_pre_softmax": not c.norm_topk_prob},
    lambda p: {"norm_topk_prob": not p.moe_router_pre_softmax},
)


FIRST_K_DENSE = Rule(
    ("first_k_dense_replace", "mlp_layer_types"),
    lambda c: {"moe_layer_freq": [int(i >= c.first_k_dense_replace) for i in range(c.num_hidden_layers)]},
    lambda p: {"first_k_dense_replace": [*p.moe_layer_freq, 1].index(1)},
)


MLP_LAYER_TYPES = Rule(
    ("mlp_layer_types",),
    lambda c: {"moe_layer_freq": [("dense", "sparse").index(t) for t in c.mlp_layer_types]},
    lambda p: {"mlp_layer_types": [("dense", "sparse")[f] for f in p.moe_layer_freq]},
)


def _groups_to_megatron(config: HF) -> Fields:
    """One group is no grouping. The published models score a group by its best two experts, Megatron by its best
    topk // group_topk."""
    groups, chosen, topk = config.n_group, config.topk_group, config.num_experts_per_tok
    if (groups or 1) == 1:
        return {}
    best = {} if topk // chosen == 2 else {"moe_router_group_best": 2}
    return {"moe_router_num_groups": groups, "moe_router_group_topk": chosen, **best}


GROUPS = Rule(
    ("n_group", "topk_group"),
    _groups_to_megatron,
    lambda p: {"n_group": p.moe_router_num_groups or 1, "topk_group": p.moe_router_group_topk or 1},
)


def _topk_method_to_megatron(config: HF) -> Fields:
    """DeepSeek-V2: a group is scored by its best expert, and groups count only where the method says so."""
    method = config.topk_method
    if method == "greedy":
        return {}
    if method != "group_limited_greedy":
        raise ValueError(f"topk_method {method!r} is not built; known: greedy, group_limited_greedy")
    groups = {"moe_router_num_groups": config.n_group, "moe_router_group_topk": config.topk_group}
    if missing := [name for name in ("n_group", "topk_group") if not getattr(config, name)]:
        raise ValueError(f"topk_method group_limited_greedy without {' and '.join(missing)}")
    return {**groups, "moe_router_group_best": 1}


def _topk_method_to_hf(provider) -> Fields:
    if not provider.moe_router_num_groups:
        return {"topk_method": "greedy"}
    return {
        "topk_method": "group_limited_greedy",
        "n_group": provider.moe_router_num_groups,
        "topk_group": provider.moe_router_group_topk,
    }


TOPK_METHOD = Rule(("topk_method", "n_group", "topk_group"), _topk_method_to_megatron, _topk_method_to_hf)


def shared_experts(name: str) -> Rule:
    """`name` shared experts, each as wide as a routed one, run as one wide expert."""

    def to_megatron(config: HF) -> Fields:
        count = getattr(config, name)
        return {"moe_shared_expert_intermediate_size": count * config.moe_intermediate_size} if count else {}

    return Rule(
        (name,),
        to_megatron,
        lambda p: {name: (p.moe_shared_expert_intermediate_size or 0) // (p.moe_ffn_hidden_size or 1)},
    )


SHARED_EXPERTS = shared_experts("n_shared_experts")

# Routing by sigmoid with a bias that chooses and does not weigh; probabilities are renormalised and scaled.
SIGMOID_ROUTER = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_dtype": "fp32",
}


def _moe_layers_to_megatron(config: HF) -> Fields:
    dense = set(_get(config, "mlp_only_layers", ()))
    step = _get(config, "decoder_sparse_step", 1)
    return {"moe_layer_freq": [int(i not in dense and (i + 1) % step == 0) for i in range(config.num_hidden_layers)]}


MOE_LAYERS = Rule(
    ("mlp_only_layers", "decoder_sparse_step"),
    _moe_layers_to_megatron,
    lambda p: {"mlp_only_layers": [i for i, moe in enumerate(p.moe_layer_freq) if not moe], "decoder_sparse_step": 1},
)
