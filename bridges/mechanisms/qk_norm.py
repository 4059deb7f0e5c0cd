"""Norms of queries and keys that Megatron does not have: over all heads together, and after the rope.

OLMo-2, OLMoE and MiniMax-M2 take one RMS over the whole query (key) projection, which tensor parallelism cuts: one
all-reduce of a number per token. Hunyuan rotates first and then takes the norm of each head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention
from torch.nn import Parameter

from bridges.providers.provider import GPTModelProvider


class WholeNorm(torch.nn.Module):
    """RMSNorm over all heads of a projection: `weight` [heads x head dim] whole on every tensor-parallel rank, which uses
    its own rows; Megatron sums the gradients of q and k norms over tensor parallel.

    With fewer heads than ranks (keys) a head is on several, and counts once.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float, *, heads: int):
        super().__init__()
        if config.normalization != "RMSNorm":
            raise ValueError(f"a {config.normalization} over a whole projection is not built: RMSNorm is")
        self.eps, self.heads = eps, heads
        self.group: Any = parallel_state.get_tensor_model_parallel_group()
        self.weight = Parameter(torch.ones(heads * hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [s b n d], n heads on this rank, gives the same shape."""
        rank, size, (n, d) = self.group.rank(), self.group.size(), x.shape[-2:]
        copies = n * size // self.heads
        x32 = x.float()
        squares = x32.square().sum((-2, -1), keepdim=True)
        if size > 1:
            squares = reduce_from_tensor_model_parallel_region(squares, group=self.group)
            squares = copy_to_tensor_model_parallel_region(squares, group=self.group) / copies
        x32 = x32 * torch.rsqrt(squares / (self.heads * d) + self.eps)
        first = rank // copies * n
        return (x32 * self.weight.float().view(self.heads, d)[first : first + n]).to(x.dtype)


class NormAfterRope(SelfAttention):
    """Attention whose q and k norms stand behind the rope."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        norms = self.q_layernorm, self.k_layernorm

        def normalise(module, inputs):
            query, key, *rest = inputs
            return (norms[0](query), norms[1](key), *rest)  # type: ignore[misc]

        self.core_attention.register_forward_pre_hook(normalise)  # type: ignore[union-attr]

    def get_query_key_value_tensors(self, *args, **kwargs):
        norms = self.q_layernorm, self.k_layernorm
        self.q_layernorm = self.k_layernorm = None
        try:
            return super().get_query_key_value_tensors(*args, **kwargs)
        finally:
            self.q_layernorm, self.k_layernorm = norms


@dataclass
class QKNormProvider(GPTModelProvider):
    """A decoder whose q and k norms are over whole projections, or behind the rope."""

    whole_qk_norm: bool = False
    qk_norm_after_rope: bool = False

    def edit_layer(self, spec: Any) -> None:
        super().edit_layer(spec)
        attention = spec.submodules.self_attention
        if self.whole_qk_norm:
            heads = {"q_layernorm": self.num_attention_heads, "k_layernorm": self.num_query_groups}
            for name, count in heads.items():
                setattr(attention.submodules, name, _whole(count or self.num_attention_heads))
        if self.qk_norm_after_rope:
            attention.module = NormAfterRope


def _whole(heads: int) -> Any:
    return lambda **kwargs: WholeNorm(heads=heads, **kwargs)
