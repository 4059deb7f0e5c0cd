"""Factors and softcaps: on embeddings and logits, and inside attention.

Gemma multiplies embeddings by the root of the hidden size, Gemma 2 bounds attention scores and logits by cap * tanh(x / cap),
Granite and Cohere multiply embeddings and logits. The scale of attention scores is Megatron's own `softmax_scale`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bridges.config_rules import Fields, Rule
from bridges.providers.core_attention import CoreAttention
from bridges.providers.provider import GPTModelProvider


@dataclass
class ScalesProvider(GPTModelProvider):
    """A decoder with factors on embeddings and logits, and softcaps on attention scores and logits."""

    embedding_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    logits_divisor: float = 1.0
    logits_softcap: float | None = None
    attention_softcap: float | None = None

    def finalize(self):
        linear = self.cross_entropy_loss_fusion and self.cross_entropy_fusion_impl == "linear"
        if linear and self._changes_logits():
            raise ValueError("cross_entropy_fusion_impl = 'linear' skips this model's logits softcap and multiplier")
        return super().finalize()

    def _changes_logits(self) -> bool:
        return (self.logits_multiplier, self.logits_divisor, self.logits_softcap) != (1.0, 1.0, None)

    def edit_layer(self, spec: Any) -> None:
        super().edit_layer(spec)
        if self.attention_softcap is not None:  # Transformer Engine has no softcap
            spec.submodules.self_attention.submodules.core_attention = CoreAttention

    def finish(self, model: Any) -> None:
        super().finish(model)
        if self.embedding_multiplier != 1.0 and hasattr(model, "embedding"):
            model.embedding.register_forward_hook(_scale_embedding)
        if hasattr(model, "output_layer") and self._changes_logits():
            model.output_layer.register_forward_hook(_scale_logits)


def _scale_embedding(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    """The factor is rounded to the embedding's dtype first, as transformers does."""
    return output * torch.tensor(module.config.embedding_multiplier, dtype=output.dtype)


def _scale_logits(module: Any, args: Any, output: tuple) -> tuple:
    config, (logits, *rest) = module.config, output
    if config.logits_multiplier != 1.0:
        logits = logits * config.logits_multiplier
    if config.logits_divisor != 1.0:
        logits = logits / config.logits_divisor
    if (cap := config.logits_softcap) is not None:
        logits = torch.tanh(logits / cap) * cap
    return (logits, *rest)


def _scale_to_megatron(config: Any) -> Fields:
    return {"softmax_scale": config.query_pre_attn_scalar**-0.5}


def _scale_to_hf(provider: Any) -> Fields:
    scalar = provider.softmax_scale**-2
    return {"query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-9 * scalar else scalar}


QUERY_PRE_ATTN_SCALAR = Rule(("query_pre_attn_scalar",), _scale_to_megatron, _scale_to_hf)

GEMMA_EMBEDDING = Rule(  # computed, never configured
    (),
    lambda c: {"embedding_multiplier": c.hidden_size**0.5},
    lambda p: {},
)

SOFTCAPS = [("attn_logit_softcapping", "attention_softcap"), ("final_logit_softcapping", "logits_softcap")]
