"""The shrinking rule: a published config becomes a toy's that has its structure and none of its size.

What is kept: every field that is not a size; which layers are of which kind, and at least one of each; whether queries
share keys and in what manner; whether heads make up the hidden size, exceed it or fall short of it; experts in groups,
shared experts, first dense layers; the kind of rope and the part that is rotated; tied or not; multi-token prediction.
What changes: widths become small and different from each other, the vocabulary a prime, windows shorter than a toy's
sequence, epsilons large enough to be seen. A relation that a toy cannot keep is an error that names it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

VOCABULARY = 131  # a prime: no tensor-parallel size divides it
WINDOW = 8  # a toy's sequence has 24 tokens
LAYERS = 8  # at least, and a multiple of four, so that four stages of two chunks can be filled
LARGE = 512  # an unknown whole number above this may be a size

Config = dict[str, Any]


class ShrinkError(ValueError):
    """A config that cannot be made small without losing a relation: the message names it."""


# Storage, code and files of the published model: nothing of its structure.
DROPPED = ("quantization_config", "compression_config", "auto_map", "_name_or_path", "name_or_path")

# Alike in all families: a field and its toy value. Widths that meet in one product are all different.
PLAIN: dict[str, int] = {
    "moe_intermediate_size": 40,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 8,
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    "vocab_size": VOCABULARY,
}
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
EPSILON = 0.01

FALCON_GROUPS = "num_kv_heads"
HEADS, GROUPS, HEAD_DIM, HIDDEN = "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size"
EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
TOPK = ("num_experts_per_tok", "moe_k", "top_k_experts")
SHARED_COUNT = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
# Fields that count the first layers of a kind, and lists of layer numbers.
FIRST_LAYERS = ("first_k_dense_replace", "moe_layer_start_index", "max_window_layers")
LAYER_NUMBERS = ("mlp_only_layers",)
MTP_DEPTH = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
SHARED_WIDTHS = ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size")
SIZES = (GROUPS, HEAD_DIM, *PLAIN, *EXPERTS, *TOPK, *SHARED_COUNT, *SHARED_WIDTHS, "linear_num_value_heads")


def shrink(config: Mapping[str, Any]) -> Config:
    """Return a toy's config.json for a published one. ShrinkError: see the module's text."""
    toy: Config = {k: copy.deepcopy(v) for k, v in config.items() if k not in DROPPED}
    missing = [name for name in (HIDDEN, HEADS, "num_hidden_layers", "vocab_size") if not _positive(config.get(name))]
    if missing:
        raise ShrinkError(f"config has no {', '.join(missing)}: a decoder's toy is made from these")
    _attention(config, toy)
    _widths(config, toy)
    _experts(config, toy)
    _layers(config, toy)
    _rope(config, toy)
    _tokens(config, toy)
    for name in [name for name in EPSILONS if toy.get(name) is not None]:
        toy[name] = EPSILON
    for name in ("torch_dtype", "dtype"):
        if name in toy:
            toy[name] = "float32"
    return toy


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _set(config: Mapping[str, Any], toy: Config, values: Mapping[str, Any]) -> None:
    """Give fields that the config states, and does not leave empty, their toy value."""
    toy.update({name: value for name, value in values.items() if config.get(name)})


def _attention(config: Mapping[str, Any], toy: Config) -> None:
    """Query heads, groups and channels: one group, some or as many as heads; together as wide as the hidden size or not."""
    heads = config[HEADS]
    groups = config.get(GROUPS) or config.get(FALCON_GROUPS) or heads
    if heads % groups:
        raise ShrinkError(f"{HEADS} = {heads} is no multiple of {GROUPS} = {groups}")
    ratio = heads // groups
    if ratio == 1:
        small, few = 4, 4
    elif groups == 1:
        small, few = 4, 1
    elif ratio % 2:
        small, few = 12, 4
    else:
        small, few = (4, 2) if ratio == 2 else (8, 2)
    channels = config.get(HEAD_DIM)
    width = {4: 16, 8: 8, 12: 8}[small]
    hidden = small * width
    if channels and not config.get("kv_lora_rank"):
        if heads * channels > config[HIDDEN]:
            hidden, width = 64 if small != 12 else 96, 2 * width
        elif heads * channels < config[HIDDEN]:
            hidden += 2 * small if small == 12 else 16
    toy[HEADS], toy[HIDDEN] = small, hidden
    _set(config, toy, {GROUPS: few, FALCON_GROUPS: few, HEAD_DIM: width})
    if config.get("kv_lora_rank") and config.get(HEAD_DIM):
        # transformers' head_dim of latent attention is the rotated part.
        toy[HEAD_DIM] = PLAIN["qk_rope_head_dim"]
    for name in ("query_pre_attn_scalar", "attention_multiplier"):
        if config.get(name):
            toy[name] = _like_channels(name, config[name], channels or config[HIDDEN] // heads, width)


def _like_channels(name: str, value: float, channels: int, width: int) -> float:
    """A softmax scale that follows from the channels of a head follows from the toy's."""
    powers: dict[str, Callable[[float], float]] = {
        "its channels": lambda d: d,
        "their inverse": lambda d: 1 / d,
        "their inverse root": lambda d: d**-0.5,
    }
    for power in powers.values():
        if abs(value - power(channels)) < 1e-6 * abs(value):
            return type(value)(power(width))
    return value


def _widths(config: Mapping[str, Any], toy: Config) -> None:
    hidden = toy[HIDDEN]
    _set(config, toy, PLAIN)
    # Three halves of the hidden size, as no other product of the toy's numbers is.
    _set(config, toy, {"intermediate_size": hidden * 3 // 2, "ffn_hidden_size": hidden * 3 // 2})
    if key_heads := config.get("linear_num_key_heads"):
        value_heads = config.get("linear_num_value_heads") or key_heads
        if value_heads % key_heads:
            raise ShrinkError(f"linear_num_value_heads = {value_heads} is no multiple of {key_heads} key heads")
        toy["linear_num_value_heads"] = toy["linear_num_key_heads"] * (value_heads // key_heads)


def _experts(config: Mapping[str, Any], toy: Config) -> None:
    """Few experts, a choice of fewer; groups of them where there are groups; the relations of all these."""
    name = next((n for n in EXPERTS if config.get(n)), None)
    if name is None:
        return
    count, topk_name = config[name], next((n for n in TOPK if config.get(n)), None)
    topk = config[topk_name] if topk_name else 1
    if topk > count:
        raise ShrinkError(f"{topk_name} = {topk} of {name} = {count}: more experts are chosen than there are")
    experts, chosen = min(count, 8), min(topk, 3, max(1, min(count, 8) - 1)) if topk < count else min(count, 8)
    if (groups := config.get("n_group") or 1) > 1:
        of_groups = config["topk_group"]
        if count % groups or topk % of_groups:
            raise ShrinkError(f"{count} experts in {groups} groups, {topk} from {of_groups}: they do not divide")
        each = topk // of_groups
        small_groups, small_chosen = 4, 4 if of_groups == groups else 2
        experts, chosen = small_groups * max(2, each), each * small_chosen
        toy["n_group"], toy["topk_group"] = small_groups, small_chosen
    for other in EXPERTS:
        if config.get(other):
            toy[other] = experts
    if topk_name:
        toy[topk_name] = chosen
    for shared in SHARED_COUNT:
        if config.get(shared):
            toy[shared] = min(config[shared], 2)
    routed = config.get("moe_intermediate_size")
    for shared in SHARED_WIDTHS:
        if config.get(shared):
            toy[shared] = toy["moe_intermediate_size"] if config[shared] == routed else 48


def _layers(config: Mapping[str, Any], toy: Config) -> None:
    """As many of the first layers as hold one of each kind, at least LAYERS; lists over layers are cut."""
    published = config["num_hidden_layers"]
    lists = {k: v for k, v in config.items() if isinstance(v, list) and len(v) == published and published > 1}
    period = config.get("full_attention_interval") or config.get("decoder_sparse_step") or 1
    needed, all_layers = [LAYERS, period], []
    for name in FIRST_LAYERS:
        first: Any = config.get(name)
        if _positive(first) and first < published:
            toy[name] = min(first, 3)
            needed.append(toy[name] + 1)
        elif _positive(first):
            all_layers.append(name)
    for values in lists.values():
        seen = [values.index(value) for value in values if isinstance(value, str | int)]
        needed.append(max(seen, default=0) + 1)
    count = -(-max(needed) // 4) * 4
    if count > 4 * LAYERS:
        raise ShrinkError(f"it takes the first {count} layers to have one of each kind: more than a toy has")
    toy["num_hidden_layers"] = count
    toy.update(dict.fromkeys(all_layers, count))
    for name, values in lists.items():
        toy[name] = _repeated(values, count)
    for name in LAYER_NUMBERS:
        if config.get(name):
            toy[name] = [n for n in config[name] if n < count] or [1]
    if isinstance(end := config.get("moe_layer_end_index"), int) and end >= 0:
        toy["moe_layer_end_index"] = count - (published - end if end < published else 0)
    for name in MTP_DEPTH:
        if config.get(name):
            toy[name] = min(config[name], 2)


def _repeated(values: Sequence[Any], count: int) -> list[Any]:
    """The first `count`, begun anew where the published model is shallower than its toy."""
    return [values[i % len(values)] for i in range(count)]


def _rope(config: Mapping[str, Any], toy: Config) -> None:
    """The kind and its constants stay. Lists over rotated channels are thinned, llama3's zones are moved to where a short
    sequence meets them."""
    scalings = [toy[name] for name in ("rope_scaling", "rope_parameters") if isinstance(toy.get(name), dict)]
    scalings += [inner for outer in scalings for inner in outer.values() if isinstance(inner, dict)]
    percent = toy.get("partial_rotary_factor") or next(
        (s["partial_rotary_factor"] for s in scalings if s.get("partial_rotary_factor")), 1
    )
    width = toy.get("qk_rope_head_dim") or toy.get(HEAD_DIM) or toy[HIDDEN] // toy[HEADS]
    rotated = width if toy.get("kv_lora_rank") else int(width * percent)
    if rotated % 2 or not rotated:
        raise ShrinkError(f"partial_rotary_factor = {percent} of {width} channels: an even number is rotated")
    for scaling in scalings:
        if scaling.get("rope_type", scaling.get("type")) == "llama3":
            scaling["original_max_position_embeddings"] = 64
        for name in ("short_factor", "long_factor"):
            if isinstance(values := scaling.get(name), list):
                scaling[name] = [values[i * len(values) // (rotated // 2)] for i in range(rotated // 2)]
        if isinstance(sections := scaling.get("mrope_section"), list):
            scaling["mrope_section"] = _sections(sections, rotated // 2)


def _sections(sections: Sequence[int], total: int) -> list[int]:
    """`total` shared out as the sections share theirs, none empty."""
    if total < len(sections):
        raise ShrinkError(f"mrope_section {list(sections)} over {total} rotated pairs: too few for a toy")
    small = [max(1, s * total // sum(sections)) for s in sections]
    small[0] += total - sum(small)
    return small


def _tokens(config: Mapping[str, Any], toy: Config) -> None:
    """Special tokens lie within the small vocabulary, different ones at different places."""
    place: dict[int, int] = {}

    def within(token: Any) -> Any:
        if isinstance(token, list):
            return [within(one) for one in token]
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            return token
        return place.setdefault(token, VOCABULARY - 1 - len(place) if token >= VOCABULARY - 8 else token)

    for name in sorted(name for name in config if name.endswith("_token_id")):
        toy[name] = within(config[name])


def unshrunk(toy: Mapping[str, Any]) -> list[str]:
    """Fields of a toy that may be sizes which the rule does not know: whole numbers above LARGE."""
    known = {
        "max_position_embeddings",
        "original_max_position_embeddings",
        "max_sequence_length",
        "max_window_layers",
        "rope_theta",
        "seq_length",
        "model_max_length",
    }
    return sorted(
        name
        for name, value in toy.items()
        if name not in known and isinstance(value, int) and not isinstance(value, bool) and value > LARGE
    )
