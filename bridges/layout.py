"""A parallel layout as a value, and the pure functions that follow from it.

`Layout` says how a model is spread over ranks; from a layout, a rank and the model's counts everything else follows
without a process group: which layers, which experts, which rows. tests/test_layout.py ties these functions to the
groups and the models that Megatron-Core itself builds.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from bridges.errors import GoldengateError

AXES = ("tp", "pp", "vpp", "ep", "etp", "cp", "dp")


class LayoutError(GoldengateError, ValueError):
    """A layout that cannot be: the message says which number does not divide which."""


@dataclass(frozen=True)
class Coords:
    """Where one rank stands on every axis. Attention axes (tp, cp, dp, pp), expert axes (etp, ep, edp, pp)."""

    tp: int
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    edp: int


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel axes. Prints as and parses from `tp2-pp2-vpp2-ep2-etp1-cp2-sp`; `tp1` is one rank.

    `etp` None means Megatron's default, expert tensor parallel = tensor parallel. `split` is an explicit pipeline split,
    decoder layers per chunk in layer order (chunk c runs on stage c % pp), printed as `split3.5`; an MTP block with
    a stage of its own is asked for by a trailing 0, as in `split4.4.0`.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int | None = None
    cp: int = 1
    sp: bool = False
    dp: int = 1
    split: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.etp is None:
            object.__setattr__(self, "etp", self.tp)
        for axis in AXES:
            if (size := getattr(self, axis)) < 1:
                raise LayoutError(f"layout axis {axis}={size}: a parallel size is at least 1")
        if self.vpp > 1 and self.pp == 1:
            raise LayoutError(f"vpp={self.vpp} needs pp > 1: virtual stages interleave over pipeline ranks")
        if self.sp and self.tp == 1:
            raise LayoutError("sp needs tp > 1: sequence parallelism shards over the tensor-parallel group")
        if self.split is not None and len(self.split) != self.pp * self.vpp:
            raise LayoutError(
                f"split {self.split} has {len(self.split)} chunks; pp{self.pp} x vpp{self.vpp} needs "
                f"{self.pp * self.vpp}"
            )
        inner = self.tp * self.cp * self.dp
        if inner % (self.expert_tp * self.ep):
            if self.dp == 1:  # the smallest data-parallel size that makes room for the experts
                dp = next(
                    d
                    for d in range(1, self.expert_tp * self.ep + 1)
                    if (self.tp * self.cp * d) % (self.expert_tp * self.ep) == 0
                )
                object.__setattr__(self, "dp", dp)
            else:
                raise LayoutError(
                    f"tp{self.tp} x cp{self.cp} x dp{self.dp} = {inner} ranks a stage cannot be divided by "
                    f"etp{self.expert_tp} x ep{self.ep} = {self.expert_tp * self.ep}"
                )

    @property
    def expert_tp(self) -> int:
        assert self.etp is not None
        return self.etp

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.dp * self.pp

    @property
    def num_chunks(self) -> int:
        return self.pp * self.vpp

    def __str__(self) -> str:
        parts = [f"{a}{getattr(self, a)}" for a in ("tp", "pp", "vpp", "ep") if getattr(self, a) > 1]
        if self.etp != self.tp:
            parts.append(f"etp{self.etp}")
        if self.cp > 1:
            parts.append(f"cp{self.cp}")
        if self.sp:
            parts.append("sp")
        if self.dp != dataclasses.replace(self, dp=1).dp:
            parts.append(f"dp{self.dp}")
        if self.split is not None:
            parts.append("split" + ".".join(map(str, self.split)))
        return "-".join(parts) or "tp1"

    @classmethod
    def parse(cls, text: str | Layout) -> Layout:
        if isinstance(text, Layout):
            return text
        kwargs: dict = {}
        for word in text.strip().split("-"):
            if word == "sp":
                key, value = "sp", True
            elif match := re.fullmatch(r"split(\d+(?:\.\d+)*)", word):
                key, value = "split", tuple(map(int, match[1].split(".")))
            elif (match := re.fullmatch(r"([a-z]+)(\d+)", word)) and match[1] in AXES:
                key, value = match[1], int(match[2])
            else:
                raise LayoutError(
                    f"layout {text!r}: cannot read {word!r}; write e.g. tp2-pp2-vpp2-ep2-etp1-cp2-sp "
                    f"(axes {', '.join(AXES)}, sp, split3.5)"
                )
            if key in kwargs:
                raise LayoutError(f"layout {text!r}: {key} is given twice")
            kwargs[key] = value
        return cls(**kwargs)

    def coords(self, rank: int) -> Coords:
        """Megatron's default order tp-cp-ep-dp-pp: tp varies fastest, pp slowest; experts regroup (tp, cp, dp) of one
        stage as (etp, ep, edp)."""
        if not 0 <= rank < self.world_size:
            raise LayoutError(f"rank {rank} is not in layout {self} of {self.world_size} ranks")
        inner, pp = rank % (self.world_size // self.pp), rank // (self.world_size // self.pp)
        etp = self.expert_tp
        return Coords(
            tp=inner % self.tp,
            cp=inner // self.tp % self.cp,
            dp=inner // (self.tp * self.cp),
            pp=pp,
            etp=inner % etp,
            ep=inner // etp % self.ep,
            edp=inner // (etp * self.ep),
        )

    def chunk_layers(self, num_layers: int) -> list[range]:
        """Decoder layers of each model chunk in layer order; chunk c is virtual stage c // pp of pipeline rank c % pp."""
        split = self.split
        if split is None:
            if num_layers < self.num_chunks:
                raise LayoutError(
                    f"{num_layers} layers cannot fill pp{self.pp} x vpp{self.vpp} = {self.num_chunks} model chunks"
                )
            # Uneven counts give the earlier chunks one layer more.
            base, more = divmod(num_layers, self.num_chunks)
            split = tuple(base + (c < more) for c in range(self.num_chunks))
        if sum(split) != num_layers:
            raise LayoutError(
                f"split {'.'.join(map(str, split))} holds {sum(split)} layers; the model has {num_layers}"
            )
        starts = [sum(split[:c]) for c in range(len(split))]
        return [range(s, s + n) for s, n in zip(starts, split, strict=True)]

    def experts(self, ep_rank: int, num_experts: int) -> range:
        """Global indices of the experts that expert-parallel rank `ep_rank` holds (contiguous placement)."""
        if num_experts % self.ep:
            raise LayoutError(f"{num_experts} experts cannot be divided by ep={self.ep}")
        local = num_experts // self.ep
        return range(ep_rank * local, (ep_rank + 1) * local)

    def check(
        self,
        *,
        num_layers: int,
        num_heads: int,
        num_query_groups: int,
        ffn: int,
        num_experts: int | None = None,
        moe_ffn: int | None = None,
        shared_ffn: int | None = None,
    ) -> None:
        """Raise LayoutError naming the first number that does not divide (or that the layout cannot fill)."""
        self.chunk_layers(num_layers)
        tp, etp = self.tp, self.expert_tp
        if num_heads % tp:
            raise LayoutError(f"{num_heads} attention heads cannot be divided by tp={tp}")
        if num_query_groups % tp and tp % num_query_groups:
            raise LayoutError(f"{num_query_groups} query groups and tp={tp}: one must divide the other")
        if ffn % tp:
            raise LayoutError(f"feed-forward width {ffn} cannot be divided by tp={tp}")
        if num_experts is None:
            if self.ep > 1 or etp != tp:
                raise LayoutError(f"layout {self} asks for expert parallelism; the model has no experts")
            return
        self.experts(0, num_experts)
        if moe_ffn is not None and moe_ffn % etp:
            raise LayoutError(f"expert width {moe_ffn} cannot be divided by etp={etp}")
        if shared_ffn and shared_ffn % tp:
            raise LayoutError(f"shared-expert width {shared_ffn} cannot be divided by tp={tp}")
