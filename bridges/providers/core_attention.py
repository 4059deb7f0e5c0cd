"""Softmax attention in plain PyTorch, with what Transformer Engine's kernels have and with a softcap, which they do not have.

It is the core attention of every model on a CPU, and on a GPU that of models with a softcap.

Shapes: s sequence on this rank, b batch, n heads on this rank, g query groups on this rank, d head dim, e value dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from megatron.core.utils import divide
from torch.nn import Parameter


class CoreAttention(torch.nn.Module):
    """Softmax attention in plain PyTorch: causal, grouped queries, K and V of different widths, sliding window, sinks,
    softcap, context parallel (each rank gathers the K and V of the others; ranks hold the zig-zag halves Megatron gives them).

    query [s b n d], key [s b g d], value [s b g e] -> [s b (n e)].
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type,
        attention_type: str,
        attention_dropout=None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        num_splits=None,
        cp_comm_type=None,
        pg_collection: Any = None,
    ):
        super().__init__()
        self.config, self.pg_collection = config, pg_collection
        self.scale = softmax_scale or 1.0 / math.sqrt(k_channels or config.kv_channels or 1)
        self.softcap: float | None = getattr(config, "attention_softcap", None)
        skip: Any = config.window_attn_skip_freq
        windowed = is_layer_window_attention(config.window_size, skip, layer_number)
        self.window = config.window_size if windowed else None
        if config.softmax_type == "learnable":
            heads = divide(config.num_attention_heads, pg_collection.tp.size())
            self.softmax_offset = Parameter(torch.empty(heads, dtype=config.params_dtype))
        elif config.softmax_type != "vanilla":
            raise ValueError(f"softmax_type {config.softmax_type!r}: vanilla or learnable is known")

    def forward(
        self,
        query,
        key,
        value,
        attention_mask,
        attn_mask_type=None,
        attention_bias=None,
        packed_seq_params=None,
        num_splits=None,
    ):
        if packed_seq_params is not None or attention_bias is not None:
            raise ValueError("packed sequences and attention biases are not built in PyTorch attention")
        cp = self.pg_collection.cp
        positions = zigzag_positions(query.size(0), cp.rank(), cp.size())
        key_positions = positions
        if cp.size() > 1:
            key, value = (_AllGather.apply(x.contiguous(), cp) for x in (key, value))
            key_positions = torch.cat([zigzag_positions(query.size(0), r, cp.size()) for r in range(cp.size())])

        s, b, n, _ = query.shape
        key, value = (x.repeat_interleave(n // x.size(2), dim=2) for x in (key, value))
        scores = torch.einsum("sbnd,tbnd->bnst", query, key) * self.scale
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        distance = (positions[:, None] - key_positions[None, :]).to(query.device)
        hidden = distance < 0
        if self.window is not None:  # (w, 0): w tokens before this one, and itself
            hidden |= distance > self.window[0]
        scores = scores.masked_fill(hidden, float("-inf"))
        if hasattr(self, "softmax_offset"):  # a sink takes part in the softmax and has no value
            sink = self.softmax_offset[None, :, None, None].expand(b, n, s, 1)
            scores = torch.cat([scores, sink.to(scores.dtype)], dim=-1)
        probs = scores.float().softmax(-1).to(query.dtype)[..., : key.size(0)]
        return torch.einsum("bnst,tbne->sbne", probs, value).reshape(s, b, -1)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.pg_collection.tp,
            dp_cp_group=metadata["dp_cp_group"],
        )


def zigzag_positions(local: int, rank: int, size: int) -> torch.Tensor:
    """Global positions [local] of the tokens that context-parallel rank `rank` of `size` holds: the sequence is cut into
    2 x size pieces and rank r takes pieces r and 2 x size - 1 - r, so that causal work is even."""
    if size == 1:
        return torch.arange(local)
    if local % 2:
        raise ValueError(f"{local} tokens a rank: context parallelism needs an even number")
    half = local // 2
    first, last = rank * half, (2 * size - 1 - rank) * half
    return torch.cat([torch.arange(first, first + half), torch.arange(last, last + half)])


class _AllGather(torch.autograd.Function):
    """Every rank's tensor along the first dim. Over gloo the backward of torch's own mistakes ranks of a group for ranks
    of the world."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        pieces = [torch.empty_like(x) for _ in range(group.size())]
        torch.distributed.all_gather(pieces, x, group=group)
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx, *grads):
        whole = grads[0].clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(whole, group=ctx.group)
        return whole.chunk(ctx.group.size())[ctx.group.rank()], None
