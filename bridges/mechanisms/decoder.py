"""The decoder that families with other norms, scales, ropes or an other order of blocks are built from."""

from __future__ import annotations

from dataclasses import dataclass

from bridges.mechanisms.branches import BranchesProvider
from bridges.mechanisms.qk_norm import QKNormProvider
from bridges.mechanisms.ropes import RopesProvider
from bridges.mechanisms.scales import ScalesProvider


@dataclass
class DecoderProvider(BranchesProvider, ScalesProvider, QKNormProvider, RopesProvider):
    """A GPTModelProvider with every mechanism of grouped-query decoders; all are off until a family asks for them."""

    # EXAONE's words for which layers have a window ("LLLG", 4), kept for its config.json; window_attn_skip_freq counts.
    window_pattern: str | int | None = None
