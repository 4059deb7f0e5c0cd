"""What is measured, as data: models of few layers with the dims of published ones, and the pieces of them to run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from harness.bench.published import PUBLISHED

SEQUENCE, TOY_SEQUENCE = 4096, 64
INPUT_SETS = 4  # a round runs each of them once

ATTENTION = ("qkv", "core_attention", "o_proj")
LATENT = ("mla_q_down", "mla_q_up", "mla_kv_down", "mla_kv_up", "core_attention", "o_proj")
DELTA = ("gdn_in_proj", "gdn_conv", "gdn_recurrence", "gdn_out_proj")
EXPERTS = ("router", "experts", "shared_experts", "shared_expert_gate")
HEAD = ("mtp_head", "mtp_head_padding")


@dataclass(frozen=True)
class Model:
    """A model of few layers: a published config.json with changes, the same at toy dims, fields of the provider.

    `fused`: provider fields for GPU kernels that training recipes use, off on a CPU and with `--unfused`. They change no
    result beyond rounding, which tests/test_bench.py holds on a GPU.
    """

    name: str
    published: str
    changes: dict[str, Any]
    toy: dict[str, Any]
    batch: int = 1
    fused: dict[str, Any] = field(default_factory=dict)

    def config(self, *, toy: bool) -> dict[str, Any]:
        """The hub-style config.json of the dims that run. The storage format of the weights is left out."""
        raw = PUBLISHED[self.published] | self.changes | (TOY | self.toy if toy else {})
        return {key: value for key, value in raw.items() if key != "quantization_config"}


@dataclass(frozen=True)
class Case:
    """A piece of a model, forward alone or forward and backward. `module` is its path in the model ("" is all of it), and
    its FLOPs are those of `place` that are in `parts` (None: all) and not in `without`."""

    name: str
    model: Model
    backward: bool
    module: str = ""
    place: str | None = None
    parts: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()


TOY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "torch_dtype": "float32",
}
_TOY_EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
_TOY_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_FUSED = {
    "bias_activation_fusion": True,
    "cross_entropy_loss_fusion": True,
    "cross_entropy_fusion_impl": "te",
    "apply_rope_fusion": True,
}

_TOY_HEADS = {"head_dim": 16}

DENSE = Model("dense", "Qwen3-8B", {"num_hidden_layers": 4}, _TOY_HEADS, batch=2, fused=_FUSED)
MOE = Model(
    "moe",
    "Qwen3-30B-A3B",
    {"num_hidden_layers": 4},
    {**_TOY_HEADS, **_TOY_EXPERTS, "num_experts": 8},
    batch=2,
    fused=_FUSED | {"moe_permute_fusion": True},
)
# A layer of DeepSeek-V3's experts takes 23 GB, and as much for its gradients: these are its dense layers, of which it has
# three.
MLA = Model(
    "mla",
    "DeepSeek-V3",
    {"num_hidden_layers": 3, "first_k_dense_replace": 3, "num_nextn_predict_layers": 0},
    _TOY_LATENT,
    fused=_FUSED,
)
# Megatron gives a head of multi-token prediction a layer like the model's last: a dense one here.
MTP = replace(
    MLA,
    name="mtp",
    changes={"num_hidden_layers": 2, "first_k_dense_replace": 2, "num_nextn_predict_layers": 1},
)
# Three gated delta nets and one softmax attention, each with experts.
GDN = Model(
    "gdn",
    "Qwen3-Next-80B-A3B",
    {"num_hidden_layers": 4},
    {
        **_TOY_HEADS,
        **_TOY_EXPERTS,
        "num_experts": 8,
        "shared_expert_intermediate_size": 32,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    batch=2,
    fused=_FUSED | {"moe_permute_fusion": True},
)
MODELS = (DENSE, MOE, MLA, MTP, GDN)


def _pieces() -> Iterator[Case]:
    """Every piece forward, and forward and backward; those of a model together, since it is built once."""
    layer = "decoder.layers.0"
    pieces: list[tuple[str, Model, dict[str, Any]]] = [
        ("attention", DENSE, {"module": f"{layer}.self_attention", "place": "layers.0", "parts": ATTENTION}),
        ("mlp", DENSE, {"module": f"{layer}.mlp", "place": "layers.0", "parts": ("dense_mlp",)}),
        ("experts", MOE, {"module": f"{layer}.mlp", "place": "layers.0", "parts": EXPERTS}),
        ("latent_attention", MLA, {"module": f"{layer}.self_attention", "place": "layers.0", "parts": LATENT}),
        ("head", MTP, {"module": "mtp", "place": "mtp.0", "without": HEAD}),
        ("delta_net", GDN, {"module": f"{layer}.self_attention", "place": "layers.0", "parts": DELTA}),
    ]
    for model in MODELS:
        own = [(f"{model.name}.{name}", what) for name, of, what in pieces if of is model]
        for name, what in [*own, (f"{model.name}.model", {})]:
            yield Case(f"{name}.forward", model, False, **what)
            yield Case(f"{name}.train", model, True, **what)


CASES: tuple[Case, ...] = tuple(_pieces())

# The checkpoint that is imported and exported: dense layers, and a vocabulary that does not take the time of the layers.
CONVERSION = Model("conversion", "Qwen3-8B", {"num_hidden_layers": 2, "vocab_size": 32768}, _TOY_HEADS)
