"""What surrounds attention and feed-forward in a layer: norms before and after them, a factor on what they add to the
residual stream, biases of their own, and the two side by side instead of one after the other.

    Gemma 2, GLM-4     norms before and after      x + norm(f(norm(x)))       post_norm
    OLMo 2, EXAONE 4   norms after, none before    x + norm(f(x))             post_norm, pre_norm=False
    Granite            a factor                    x + m f(norm(x))           residual_multiplier
    Falcon             side by side                x + f(norm(x)) + g(norm'(x))   parallel_blocks
    Cohere             side by side, one norm      x + f(n) + g(n), n = norm(x)   parallel_blocks, shared_norm
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer

from bridges.config_rules import Rule
from bridges.conversion.mapping import AutoMapping, ParamMapping
from bridges.mechanisms.blocks import HF_LAYER, MEGATRON_LAYER
from bridges.providers.cpu_backend import Norm
from bridges.providers.provider import GPTModelProvider


class BranchEnd(torch.nn.Module):
    """Adds what attention or feed-forward gave to the residual stream, after a norm (`norm.weight` [hidden]) and times a
    factor where the model has them. It takes the place of Megatron's bias-dropout-add, for any kind of block."""

    def __init__(self, *, config: Any, norm: Any = None, factor: float = 1.0):
        super().__init__()
        self.factor = factor
        self.norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon) if norm else None

    def forward(self, training: bool, fused: bool):
        add = get_bias_dropout_add(training, fused)

        def end(output_and_bias, residual, dropout: float):
            output, bias = output_and_bias
            if bias is not None:
                output = output + bias
            if self.norm is not None:
                output = self.norm(output)
            return add((output if self.factor == 1.0 else output * self.factor, None), residual, dropout)

        return end


class ParallelLayer(TransformerLayer):
    """A layer whose feed-forward reads what its attention reads. With a shared norm that is `input_layernorm`'s output,
    else each has a norm of its own, fused into its first linear."""

    _attended: Any = None  # the residual stream with what attention gave, while the feed-forward runs

    def forward(self, hidden_states, *args, **kwargs):
        self._attended, context = self._forward_attention(hidden_states, *args, **kwargs)
        shared: Any = self.input_layernorm  # Identity where the norms are the linears'
        output = self._forward_mlp(
            shared(hidden_states),
            kwargs.get("inference_context"),
            padding_mask=kwargs.get("padding_mask"),
            packed_seq_params=kwargs.get("packed_seq_params"),
        )
        self._attended = None
        return output, context

    def _forward_post_mlp(self, mlp_output_with_bias, residual):
        return super()._forward_post_mlp(mlp_output_with_bias, self._attended)


@dataclass
class BranchesProvider(GPTModelProvider):
    """A decoder with other norms, factors, biases or order around its blocks than today's dense models have."""

    pre_norm: bool = True
    post_norm: bool = False
    residual_multiplier: float = 1.0
    parallel_blocks: bool = False
    shared_norm: bool = False
    layernorm_bias: bool = True  # False: LayerNorm without one, which Transformer Engine does not have
    attention_output_bias: bool = False  # beside add_bias_linear, which is about all linears
    mlp_bias: bool = False

    def finalize(self):
        if self.shared_norm and not self.parallel_blocks:
            raise ValueError("shared_norm without parallel_blocks: blocks that follow each other cannot share a norm")
        if self.shared_norm and self.num_moe_experts:
            raise ValueError("shared_norm with experts is not built")
        return super().finalize()

    def edit_layer(self, spec: Any) -> None:
        super().edit_layer(spec)
        layer, backend = spec.submodules, _backend()
        norm: Any = backend.layer_norm() if self.layernorm_bias else Norm
        if not self.pre_norm or self.shared_norm or not self.layernorm_bias:
            _unfuse(layer, backend, norm if self.pre_norm else IdentityOp, shared=self.shared_norm)
        if self.post_norm or self.residual_multiplier != 1.0:
            end = {"config": self, "norm": norm if self.post_norm else None, "factor": self.residual_multiplier}
            layer.self_attn_bda = layer.mlp_bda = ModuleSpec(module=BranchEnd, params=end)
        if self.parallel_blocks:
            spec.module = ParallelLayer
        if self.attention_output_bias:
            attention = layer.self_attention.submodules
            attention.linear_proj = biased(attention.linear_proj)
        if self.mlp_bias and isinstance(layer.mlp, partial):
            mlp = layer.mlp.keywords["submodules"]
            mlp.linear_fc1, mlp.linear_fc2 = biased(mlp.linear_fc1), biased(mlp.linear_fc2)

    def edit_block(self, block: Any) -> None:
        super().edit_block(block)
        if not self.layernorm_bias:
            block.layer_norm = Norm


def _backend() -> Any:
    """Transformer Engine's modules, or on a CPU those that stand for them."""
    return gpt_layer_specs.TESpecProvider()  # type: ignore[misc]


def _unfuse(layer: Any, backend: Any, norm: Any, *, shared: bool) -> None:
    """Linears without a norm in front; `norm` stands before attention, and before the feed-forward unless it is shared."""
    layer.input_layernorm = norm
    layer.pre_mlp_layernorm = IdentityOp if shared else norm
    layer.self_attention.submodules.linear_qkv = backend.column_parallel_linear()
    mlp = layer.mlp.keywords["submodules"]
    if hasattr(mlp, "linear_fc1"):  # not experts, which never have a norm in front
        mlp.linear_fc1 = backend.column_parallel_linear()


def biased(linear: Any) -> Any:
    """The same linear with a bias, whatever the configuration says of all linears."""
    return lambda *args, **kwargs: linear(*args, **{**kwargs, "bias": True})


ATTENTION_BIAS = Rule(  # on q, k, v and the output projection alike
    ("attention_bias",),
    lambda c: {"add_qkv_bias": bool(c.attention_bias), "attention_output_bias": bool(c.attention_bias)},
    lambda p: {"attention_bias": p.attention_output_bias},
)


def post_norms(
    *, layer: str = HF_LAYER, attention: str = "post_attention_layernorm", mlp: str = "post_feedforward_layernorm"
) -> list[ParamMapping]:
    """The norms behind attention and feed-forward."""
    return [
        AutoMapping(f"{MEGATRON_LAYER}.self_attn_bda.norm.weight", f"{layer}.{attention}.weight"),
        AutoMapping(f"{MEGATRON_LAYER}.mlp_bda.norm.weight", f"{layer}.{mlp}.weight"),
    ]
