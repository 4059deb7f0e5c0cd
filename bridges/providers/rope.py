"""One rotary module for every kind of rope: the frequencies are Hugging Face's own.

Megatron hard-codes the constants of llama-3 scaling and knows neither linear nor proportional rope; taking the
frequencies from transformers' rope functions makes default, llama3, linear, yarn and partial rope one mechanism.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import megatron.core
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.attention import Attention
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# Kinds whose frequencies do not depend on the sequence at hand.
STATIC_KINDS = ("default", "linear", "llama3", "yarn", "proportional", "longrope")


def inverse_frequencies(
    *,
    base: float,
    dim: int,
    scaling: dict | None,
    max_position_embeddings: int,
    percent: float = 1.0,
    seq_len: int | None = None,
) -> tuple[torch.Tensor, float]:
    """(inverse frequencies [rotary dim / 2] fp32, factor on cos and sin).

    `scaling` is a hub-style `rope_scaling` dict or None; `dim` the head dim; `percent` the part of it that is rotated.
    Frequencies of longrope are those of sequences of `seq_len`, which its caller must give.
    """
    kind = (scaling or {}).get("rope_type", "default")
    if kind not in STATIC_KINDS or (kind == "longrope" and seq_len is None):
        raise ValueError(
            f"rope_type {kind!r} depends on the sequence length and is not built; known: {', '.join(STATIC_KINDS)}"
        )
    if kind == "default":
        rotary = int(dim * percent)
        return 1.0 / (base ** (torch.arange(0, rotary, 2, dtype=torch.int64).float() / rotary)), 1.0
    parameters = {**scaling, "rope_theta": base, "partial_rotary_factor": percent}  # type: ignore[dict-item]
    config = SimpleNamespace(
        rope_parameters=parameters,
        head_dim=dim,
        hidden_size=dim,
        num_attention_heads=1,
        max_position_embeddings=max_position_embeddings,
        standardize_rope_params=lambda: None,
    )
    with torch.device("cpu"):  # a model that is built on the meta device has real frequencies all the same
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, device="cpu", seq_len=seq_len)  # type: ignore[arg-type]
    return frequencies.float(), float(factor)


class Rotary(RotaryEmbedding):
    """Megatron's rotary embedding over given frequencies. Returns angles [s, 1, 1, rotary dim] for this rank's tokens."""

    def __init__(self, frequencies: torch.Tensor, *, interleaved: bool, cp_group):
        torch.nn.Module.__init__(self)
        self.inv_freq = frequencies
        self.rotary_interleaved = interleaved
        self.seq_len_interpolation_factor = None
        self.cp_group = cp_group


def scale_rotation(model: torch.nn.Module, factor: float) -> None:
    """Let every attention layer of `model` multiply cos and sin by `factor`, which Megatron calls the concentration factor
    of yarn. RuntimeError when this Megatron keeps it elsewhere."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, Attention)]
    for layer in layers if factor != 1.0 else ():
        if not hasattr(layer, "_yarn_concentration_factor"):
            raise RuntimeError(
                f"megatron-core {megatron.core.__version__} has no Attention._yarn_concentration_factor: "
                f"a rope that multiplies cos and sin by {factor} cannot be built with it"
            )
        layer._yarn_concentration_factor = factor
