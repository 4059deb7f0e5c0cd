"""Ropes that are not one table of frequencies: a table for each type of layer, and one that depends on the sequence's length.

Gemma 3 and OLMo 3 rotate windowed layers by other angles than the rest. Phi-3's longrope has two sets of frequencies, for
sequences within the original context and for longer ones. Hunyuan's "dynamic" rope stretches the base by a fixed alpha.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention

from bridges.providers.provider import GPTModelProvider
from bridges.providers.rope import Rotary, inverse_frequencies


@dataclass(frozen=True)
class Table:
    """Inverse frequencies [rotary dim / 2] in fp32, those for sequences longer than `switch`, and the factor on cos and sin."""

    short: torch.Tensor
    factor: float = 1.0
    long: torch.Tensor | None = None
    switch: int = 0

    @property
    def width(self) -> int:
        return 2 * len(self.short)


class Tables(Rotary):
    """The angles of one or several tables side by side: [s, 1, 1, sum of rotary dims]."""

    def __init__(self, tables: list[Table], *, interleaved: bool, cp_group: Any):
        super().__init__(tables[0].short, interleaved=interleaved, cp_group=cp_group)
        self.tables = tables

    def get_emb(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        angles = []
        for table in self.tables:
            longer = table.long is not None and max_seq_len + offset > table.switch
            self.inv_freq = (table.long if longer else table.short).to(device)  # type: ignore[union-attr]
            angles.append(super().get_emb(max_seq_len, offset))
        return torch.cat(angles, dim=-1)


@dataclass
class RopesProvider(GPTModelProvider):
    """A decoder whose rope is a table for each type of layer, longrope, or dynamic with a fixed alpha.

    `rope_by_layer_type`: {layer type: rope parameters as transformers has them, rope_theta among them};
    `rope_layer_types`: the type of each layer.
    """

    rope_by_layer_type: dict[str, dict] | None = None
    rope_layer_types: list[str] | None = None

    def tables(self) -> dict[str, Table]:
        """The tables by layer type; that of all layers is called "". ValueError for a rope that is not known."""
        if self.rope_by_layer_type is None:
            return {"": self._table(self.rotary_base, self.rope_scaling, self.rotary_percent)}
        tables = {}
        for kind, given in self.rope_by_layer_type.items():
            parameters = dict(given)
            base, percent = parameters.pop("rope_theta"), parameters.pop("partial_rotary_factor", 1.0)
            tables[kind] = self._table(base, parameters, percent)
        if unknown := sorted({*(self.rope_layer_types or ())} - tables.keys()):
            raise ValueError(f"layers of type {', '.join(unknown)} have no entry in rope_by_layer_type")
        return tables

    def _table(self, base: float, scaling: dict | None, percent: float) -> Table:
        dim = self.kv_channels or self.hidden_size // self.num_attention_heads
        scaling = scaling or {}
        kind = scaling.get("rope_type", "default")
        if kind == "dynamic" and scaling.get("alpha"):
            base, scaling, kind = base * scaling["alpha"] ** (dim / (dim - 2)), {}, "default"
        sizes: dict[str, Any] = {
            "dim": dim,
            "percent": percent,
            "max_position_embeddings": self.max_position_embeddings,
        }
        if kind != "longrope":
            frequencies, factor = inverse_frequencies(
                base=base, scaling=None if kind == "default" else scaling, **sizes
            )
            return Table(frequencies, factor)
        switch = scaling["original_max_position_embeddings"]
        short, long = (
            inverse_frequencies(base=base, scaling=scaling, seq_len=length, **sizes) for length in (switch, switch + 1)
        )
        return Table(short[0], short[1], long[0], switch)

    def rope_frequencies(self) -> torch.Tensor | None:
        return next(iter(self.tables().values())).short

    def _rope(self) -> tuple[torch.Tensor, float]:
        table = next(iter(self.tables().values()))
        return table.short, table.factor

    def finish(self, model: Any) -> None:
        super().finish(model)
        tables = self.tables()
        model.rotary_pos_emb = Tables(
            list(tables.values()), interleaved=self.rotary_interleaved, cp_group=model.pg_collection.cp
        )
        starts, start = {}, 0
        for kind, table in tables.items():
            starts[kind], start = start, start + table.width
        for attention in (m for m in model.modules() if isinstance(m, SelfAttention)):
            kind = self.rope_layer_types[attention.layer_number - 1] if self.rope_layer_types else ""
            attention._yarn_concentration_factor = tables[kind].factor  # type: ignore[attr-defined]
            if len(tables) > 1:
                attention.register_forward_pre_hook(_own_table(starts[kind], tables[kind].width), with_kwargs=True)


def _own_table(start: int, width: int) -> Any:
    def choose(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        angles = kwargs.get("rotary_pos_emb")
        return args, kwargs if angles is None else {**kwargs, "rotary_pos_emb": angles[..., start : start + width]}

    return choose
