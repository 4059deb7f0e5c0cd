"""Gated delta net (linear attention) beside gated softmax attention: provider, configuration rules, mappings.

Symbols of the views: t tensor-parallel ranks, k key heads on each, r value heads a key head serves, d channels of a key
head, e of a value head; in softmax attention g query groups, n query heads of a group, d channels of a head.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import experimental_attention_variant_module_specs as variant_specs
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint

from bridges.config_rules import Fields, Rule
from bridges.conversion.mapping import AutoMapping, ParamMapping, Part, ReplicatedMapping
from bridges.layout import LayoutError
from bridges.mechanisms.blocks import HF_LAYER, MEGATRON_LAYER
from bridges.providers.provider import GPTModelProvider


@dataclass
class GatedDeltaNetProvider(GPTModelProvider):
    """A decoder whose layers are gated delta nets where `linear_attention_freq` says 1 and gated softmax attention where
    it says 0. Norms store gamma - 1, except the one inside the gated delta net.

    That one and A_log are kept in fp32 in a bf16 model: published checkpoints hold them in bf16 or fp32, and both fit.
    """

    experimental_attention_variant: Any = "gated_delta_net"
    attention_output_gate: bool = True
    layernorm_zero_centered_gamma: bool = True
    qk_layernorm: bool = True
    mrope: dict | None = None  # how image and video positions are spread over rope; text does not depend on it

    @property
    def value_heads_per_key_head(self) -> int:
        return _number(self.linear_num_value_heads) // _number(self.linear_num_key_heads)

    def check_layout(self) -> None:
        super().check_layout()
        tp, cp = self.tensor_model_parallel_size, self.context_parallel_size
        for count, kind in ((self.linear_num_key_heads, "key"), (self.linear_num_value_heads, "value")):
            if _number(count) % (tp * cp):
                raise LayoutError(f"{count} linear {kind} heads cannot be divided by tp={tp} x cp={cp} = {tp * cp}")

    def finalize(self) -> GatedDeltaNetProvider:
        if not torch.cuda.is_available():
            self.deterministic_mode = True  # Megatron's plain PyTorch path; the other one is fla's GPU kernels
        super().finalize()
        return self

    def layer_spec(self, vp_stage: int | None) -> Any:
        spec: Any = variant_specs.get_transformer_block_with_experimental_attention_variant_spec(self, vp_stage)
        for layer in spec.layer_specs:
            modules = layer.submodules.self_attention.submodules
            # Layers share one spec: the norm in it is changed once.
            norm: Any = getattr(modules, "out_norm", None)
            if isinstance(modules, GatedDeltaNetSubmodules) and not issubclass(norm, _PlainNorm):
                modules.out_norm = type("PlainNorm", (_PlainNorm,), {"norm": staticmethod(norm)})
        return spec

    def all_layer_specs(self) -> Any:
        backend = variant_specs._get_backend_spec_provider(config=self)
        return variant_specs.get_transformer_layer_with_experimental_attention_variant_spec(self, backend)

    def provide(self, *args, **kwargs) -> GPTModel:
        model = super().provide(*args, **kwargs)
        for module in model.modules():
            if isinstance(module, GatedDeltaNet):
                gamma: Any = module.out_norm.weight
                for parameter in (module.A_log, gamma):
                    parameter.data = parameter.data.float()
                # Each rank sees its own heads. Megatron sums the gradients of replicated norms over tensor parallel with
                # sequence parallelism, and without it those of the q and k norms alone.
                if module.tp_size > 1 and not self.sequence_parallel:
                    gamma.register_hook(partial(_sum_over, module.tp_group))
        return model


def _sum_over(group, gradient: torch.Tensor) -> torch.Tensor:
    whole = gradient.clone()
    torch.distributed.all_reduce(whole, group=group)
    return whole


class _PlainNorm:
    """Builds the backend's norm so that it stores gamma itself, as published checkpoints do: Megatron would take it for
    gamma - 1 like every other norm of the model, and gamma - 1 is not always a number of gamma's dtype. In a distributed
    checkpoint it is `out_norm.gamma`, so that neither can be read for the other."""

    norm: Any

    def __new__(cls, config, hidden_size: int, eps: float):
        config = copy.copy(config)
        config.layernorm_zero_centered_gamma = False
        norm = cls.norm(config=config, hidden_size=hidden_size, eps=eps)
        norm.sharded_state_dict = partial(_sharded_gamma, norm)
        return norm


def _sharded_gamma(norm: torch.nn.Module, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> Any:
    """As Megatron shards a module that says nothing of its own, but for the key."""
    group = ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"]
    state = norm.state_dict(prefix="", keep_vars=True)
    sharded = make_sharded_tensors_for_checkpoint(state, prefix, {}, sharded_offsets, dp_cp_group=group)
    sharded[f"{prefix}weight"].key = f"{prefix}gamma"
    return sharded


def _number(value: int | None) -> int:
    assert value, "the heads of the gated delta net are not set"
    return value


# -- configuration -------------------------------------------------------------------------------------------------

CONFIG_MAPPING = [
    ("linear_conv_kernel_dim", "linear_conv_kernel_dim"),
    ("linear_key_head_dim", "linear_key_head_dim"),
    ("linear_value_head_dim", "linear_value_head_dim"),
    ("linear_num_key_heads", "linear_num_key_heads"),
    ("linear_num_value_heads", "linear_num_value_heads"),
]

_KINDS = ("full_attention", "linear_attention")


def _layers_to_megatron(config) -> Fields:
    if unknown := set(config.layer_types) - set(_KINDS):
        raise ValueError(f"layer_types has {', '.join(sorted(unknown))}; known: {', '.join(_KINDS)}")
    return {"linear_attention_freq": [_KINDS.index(kind) for kind in config.layer_types]}


def _layers_to_hf(provider) -> Fields:
    return {"layer_types": [_KINDS[i] for i in variant_specs.get_linear_attention_pattern(provider)]}


LAYER_TYPES = Rule(("layer_types",), _layers_to_megatron, _layers_to_hf)
FIXED = {"attention_bias": False}

_MROPE = ("mrope_section", "mrope_interleaved")


def _mrope_to_megatron(config) -> Fields:
    found = {key: config.rope_parameters[key] for key in _MROPE if key in config.rope_parameters}
    return {"mrope": found} if found else {}


def _mrope_to_hf(provider) -> Fields:
    if not provider.mrope:
        return {}
    scaling = provider.rope_scaling or {"rope_type": "default"}
    base = {"rope_theta": provider.rotary_base, "partial_rotary_factor": provider.rotary_percent}
    return {"rope_parameters": {**scaling, **base, **provider.mrope}}


MROPE = Rule(("rope_parameters",), _mrope_to_megatron, _mrope_to_hf)


# -- tensors -------------------------------------------------------------------------------------------------------


def gated_attention(*, layer: str = HF_LAYER) -> list[ParamMapping]:
    """Softmax attention with an output gate: q_proj holds (query, gate) for each head, linear_qkv the queries, the gates,
    the key and the value of each query group. Norms and output projection are those of blocks.attention."""
    a = f"{layer}.self_attn"
    return [
        ParamMapping(
            f"{MEGATRON_LAYER}.self_attention.linear_qkv.weight",
            (
                Part(f"{a}.q_proj.weight", "(g n [*d | d]) h -> g ; n d ; h"),
                Part(f"{a}.q_proj.weight", "(g n [d | *d]) h -> g ; n d ; h"),
                Part(f"{a}.k_proj.weight", "(g d) h -> g ; d ; h"),
                Part(f"{a}.v_proj.weight", "(g d) h -> g ; d ; h"),
            ),
            sizes={"g": "num_query_groups", "n": "heads_per_group", "d": "kv_channels"},
        )
    ]


def packed_projections(block: str) -> tuple[Part, ...]:
    """Qwen3-Next: [q k v z] and [b a] of each key head, one head after the other."""
    qkvz, ba = f"{block}.in_proj_qkvz.weight", f"{block}.in_proj_ba.weight"
    return (
        Part(qkvz, "(t k [*d | d | r e | r e]) h -> t ; k d ; h"),
        Part(qkvz, "(t k [d | *d | r e | r e]) h -> t ; k d ; h"),
        Part(qkvz, "(t k [d | d | *r e | r e]) h -> t ; k r e ; h"),
        Part(qkvz, "(t k [d | d | r e | *r e]) h -> t ; k r e ; h"),
        Part(ba, "(t k [*r | r]) h -> t ; k r ; h"),
        Part(ba, "(t k [r | *r]) h -> t ; k r ; h"),
    )


def separate_projections(block: str) -> tuple[Part, ...]:
    """Qwen3.5: [all q | all k | all v], and z, b, a each for itself."""
    return (
        *_qkv(f"{block}.in_proj_qkv.weight", "h"),
        Part(f"{block}.in_proj_z.weight", "(t k r e) h -> t ; k r e ; h"),
        Part(f"{block}.in_proj_b.weight", "(t k r) h -> t ; k r ; h"),
        Part(f"{block}.in_proj_a.weight", "(t k r) h -> t ; k r ; h"),
    )


def _qkv(tensor: str, rest: str) -> tuple[Part, ...]:
    """q, k and v of a tensor that holds [all q | all k | all v] on its first dim."""
    return (
        Part(tensor, f"([*t k d | t k d | t k r e]) {rest} -> t ; k d ; {rest}"),
        Part(tensor, f"([t k d | *t k d | t k r e]) {rest} -> t ; k d ; {rest}"),
        Part(tensor, f"([t k d | t k d | *t k r e]) {rest} -> t ; k r e ; {rest}"),
    )


def linear_attention(projections, *, layer: str = HF_LAYER, norm: str = "input_layernorm") -> list[ParamMapping]:
    """A gated delta net with the norm before it. `projections` gives the parts of its input projection (see above).

    Megatron holds [q k v z b a] of each rank's heads in `in_proj` and [q k v] of them in `conv1d`.
    """
    m, block = f"{MEGATRON_LAYER}.self_attention", f"{layer}.linear_attn"
    sizes: dict[str, int | str] = {
        "d": "linear_key_head_dim",
        "e": "linear_value_head_dim",
        "r": "value_heads_per_key_head",
    }
    return [
        AutoMapping(f"{m}.in_proj.layer_norm_weight", f"{layer}.{norm}.weight"),
        ParamMapping(f"{m}.in_proj.weight", projections(block), sizes=dict(sizes)),
        ParamMapping(f"{m}.conv1d.weight", _qkv(f"{block}.conv1d.weight", "o w"), sizes=dict(sizes)),
        ParamMapping(f"{m}.A_log", (Part(f"{block}.A_log", "v -> v ; ;"),)),
        ParamMapping(f"{m}.dt_bias", (Part(f"{block}.dt_bias", "v -> v ; ;"),)),
        ReplicatedMapping(f"{m}.out_norm.weight", f"{block}.norm.weight"),
        AutoMapping(f"{m}.out_proj.weight", f"{block}.out_proj.weight"),
    ]
