"""Mechanisms of a model that has no bridge, as far as its config and the tensors of Hugging Face's class show them.

The names are those of harness.mechanisms, so that both can be compared; what no bridge has yet has a name here alone.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

import toy_models
from bridges import GoldengateError, MegatronModelBridge
from harness.mechanisms import mechanisms, provider_of


@dataclass(frozen=True)
class Signs:
    """`fields` of the language model, and if transformers has the class its `tensors` and its `norms`' source code."""

    fields: Mapping[str, Any]
    tensors: Collection[str] = ()
    norms: str = ""

    def get(self, *names: str) -> Any:
        """Return the first of these fields that is set."""
        return next((self.fields[name] for name in names if self.fields.get(name)), None)

    def tensor(self, pattern: str) -> bool:
        return any(re.search(pattern, name) for name in self.tensors)

    def layer(self, *kinds: str) -> bool:
        """Is there a layer of one of these kinds?"""
        listed = self.get("layer_types", "layers_block_type", "block_types") or ()
        return any(kind in str(one) for one in listed for kind in kinds)

    @property
    def rope(self) -> Mapping[str, Any]:
        scaling = self.get("rope_parameters", "rope_scaling") or {}
        inner = [value for value in scaling.values() if isinstance(value, Mapping)]
        return next((one for one in inner if one.get("rope_type", "default") != "default"), scaling)


# The code of a norm whose weight is kept as its distance from one.
ZERO_CENTRED = re.compile(r"1(\.0)? *\+ *self\.weight|self\.weight(\.float\(\))? *\+ *1")
EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
# Name -> is there a sign of it?
SIGNS: dict[str, Callable[[Signs], Any]] = {
    "shared expert": lambda s: (
        s.tensor(r"shared_expert|shared_mlp")
        or s.get("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "shared_expert_intermediate_size")
    ),
    "sigmoid router": lambda s: (
        "sigmoid" in (s.get("scoring_func", "score_function", "moe_router_activation_func") or "")
    ),
    "expert bias": lambda s: s.tensor(r"e_score_correction_bias|expert_bias|moe_statics"),
    "expert groups": lambda s: (s.get("n_group") or 1) > 1,
    "square experts": lambda s: s.get(*EXPERTS) and s.get("moe_intermediate_size") == s.get("hidden_size"),
    "MLA": lambda s: s.get("kv_lora_rank"),
    "GDN": lambda s: s.layer("linear_attention") or s.get("linear_num_value_heads"),
    "gated attention": lambda s: s.get("attn_output_gate", "use_output_gate"),
    "q/k norm": lambda s: (
        (not s.get("kv_lora_rank") and s.tensor(r"(q|k|query|key)_(layer)?norm")) or s.get("use_qk_norm")
    ),
    "zero-centred norm": lambda s: ZERO_CENTRED.search(s.norms),
    "attention bias": lambda s: (
        s.tensor(r"(q_proj|qkv_proj|query_key_value|c_attn|W_pack)\.bias")
        or s.get("attention_bias", "qkv_bias", "add_qkv_bias")
    ),
    "sliding window": lambda s: s.get("sliding_window") and s.fields.get("use_sliding_window") is not False,
    "partial rotary": lambda s: (
        not s.get("kv_lora_rank")
        and (s.get("partial_rotary_factor", "rotary_pct") or s.rope.get("partial_rotary_factor") or 1) != 1
    ),
    "layers without rope": lambda s: s.get("no_rope_layers", "no_rope_layer_interval"),
    "MTP": lambda s: s.get("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "mtp_num_layers"),
    "tied": lambda s: s.get("tie_word_embeddings"),
    # What a bridge would have to bring along.
    "sparse attention": lambda s: s.get("index_topk", "sparse_attention_config"),
    "Mamba": lambda s: s.get("mamba_num_heads", "mamba_d_state", "ssm_state_size", "ssm_cfg") or s.layer("mamba"),
    "chunked attention": lambda s: s.get("attention_chunk_size"),
    "attention sinks": lambda s: s.tensor(r"\.sinks$|attention_sink"),
    "softcap": lambda s: s.get("final_logit_softcapping", "attn_logit_softcapping"),
    "layer norm": lambda s: s.get("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon") and not s.get("rms_norm_eps"),
    "cross-attention": lambda s: s.get("cross_attention_layers"),
    "hyper-connections": lambda s: s.get("hc_mult"),
    "multimodal rope": lambda s: s.rope.get("mrope_section"),
}


def read(signs: Signs) -> list[str]:
    """Return the mechanisms of which there is a sign, "MoE" or "dense" first."""
    kind = signs.rope.get("rope_type", signs.rope.get("type", "default"))
    rope = [] if kind in ("default", "mrope", None) else [f"rope {kind}"]
    moe = signs.get(*EXPERTS) and max(_numbers(signs.get(*EXPERTS))) > 1
    return ["MoE" if moe else "dense", *(name for name, has in SIGNS.items() if has(signs)), *rope]


def _numbers(value: Any) -> list[int]:
    return [int(one) for one in (value if isinstance(value, list) else [value])]


def of_class(fields: Mapping[str, Any], model: torch.nn.Module | None) -> Signs:
    """Return the signs of a config whose class was built (on the meta device), if there is one."""
    if model is None:
        return Signs(fields)
    kinds = {type(module) for module in model.modules() if "norm" in type(module).__name__.lower()}
    sources = [inspect.getsource(kind) for kind in kinds if kind.__module__.startswith("transformers.")]
    return Signs(fields, list(model.state_dict()), "\n".join(sources))


@dataclass(frozen=True)
class Near:
    """A family that is near by mechanisms: its row and architecture, what it has not, and what it has besides."""

    row: str
    architecture: str
    lacks: list[str]
    besides: list[str]

    @property
    def distance(self) -> int:
        """Return how far it is: what is missing has to be built, something besides may be switched off, and experts or none
        make the larger part of a bridge."""
        kinds = {"MoE", "dense"}
        return 2 * len(self.lacks) + len(self.besides) + 5 * bool(kinds & {*self.lacks})


def nearest(found: Sequence[str], count: int = 3) -> list[Near]:
    """Return the families whose mechanisms differ least from those found, the nearest first."""
    all_ = [
        Near(row, architecture, [m for m in found if m not in theirs], [m for m in theirs if m not in found])
        for row, architecture, theirs in families()
    ]
    return sorted(all_, key=lambda near: (near.distance, near.row))[:count]


def families() -> list[tuple[str, str, list[str]]]:
    """Return (row, architecture, mechanisms) of one row of each architecture that has a bridge."""
    return _families(tuple(MegatronModelBridge.supported()))


@cache
def _families(supported: tuple[str, ...]) -> list[tuple[str, str, list[str]]]:
    rows: dict[str, list[str]] = {}
    for row in toy_models.rows():
        rows.setdefault(toy_models.config_dict(row)["architectures"][0], []).append(row)
    found = []
    for architecture in (name for name in rows if name in supported):
        # The plainest row: what others have besides is switched on by fields. Reading them all would take twice as long.
        row = min(rows[architecture], key=lambda one: len(read(Signs(toy_models.config_dict(one)))))
        try:
            found.append((row, architecture, mechanisms(provider_of(row))))
        except GoldengateError:  # a row that this transformers cannot read is no neighbour
            continue
    return found
