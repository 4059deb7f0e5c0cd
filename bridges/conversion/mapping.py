"""Declarations: which Hugging Face tensors a Megatron parameter is made of, and the registry that finds them by name.

A mapping is data. Import, export, gradients and the proof that nothing is lost are all derived from it (see plan).
The named constructors carry the argument names people know from Megatron-Bridge.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from bridges.conversion.views import parse
from bridges.errors import GoldengateError

COLUMN, ROW, REPLICATED = "column", "row", "replicated"

# Megatron's names of the two parameters whose rows are the vocabulary's.
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"

# How Megatron-Core shards what its modules hold: (module, suffix) endings -> sharding. AutoMapping reads this table.
_MEGATRON_SHARDING = (
    (r"(embedding\.word_embeddings|output_layer)\.weight$", COLUMN),
    (
        r"\.(linear_qkv|linear_fc1|linear_q_up_proj|linear_kv_up_proj|linear_q_proj|in_proj|eh_proj)\.(weight|bias)\d*$",
        COLUMN,
    ),
    (r"\.(linear_proj|linear_fc2|out_proj)\.weight\d*$", ROW),
    (r"\.(linear_proj|linear_fc2|out_proj)\.bias\d*$", REPLICATED),
    (r"(layernorm|_norm|norm)\.(weight|bias)$", REPLICATED),
    (r"\.layer_norm_(weight|bias)$", REPLICATED),
    (r"\.router\.(weight|bias|expert_bias)$", REPLICATED),
    (r"\.shared_experts\.gate_weight$", REPLICATED),
    (r"\.(linear_q_down_proj|linear_kv_down_proj)\.weight$", REPLICATED),
    (r"\.core_attention\.softmax_offset$", COLUMN),
)


class MappingError(GoldengateError, ValueError):
    """A declaration that contradicts itself, or a tensor that no declaration knows."""


@dataclass(frozen=True)
class Part:
    """One Hugging Face tensor's contribution to a Megatron parameter: `view` as in bridges.conversion.views; None takes the tensor
    as it is."""

    hf: str
    view: str | None


@dataclass
class ParamMapping:
    """`megatron_param` <-> `parts`. `*` stands for a number (layer, expert); the k-th `*` of each name is the same one.

    `megatron_param` is writable on purpose: plugins copy a mapping and rename it (then build a new registry, since a
    registry compiles its patterns once).
    """

    megatron_param: str
    parts: tuple[Part, ...]
    sharding: str = COLUMN
    padded: bool = False  # vocabulary rows: Megatron may hold more rows than Hugging Face has
    side_by_side: bool = False  # the parts follow each other within a row, not one after the other down the rows
    sizes: dict[str, int | str] = field(
        default_factory=dict
    )  # symbol -> number, or the provider attribute that holds it
    variant: bool = False  # one of several forms on disk, see MegatronMappingRegistry.for_tensors

    def __post_init__(self) -> None:
        if not self.parts:
            raise MappingError(f"{self.megatron_param}: a mapping needs at least one Hugging Face tensor")
        stars = self.megatron_param.count("*")
        for part in self.parts:
            free = len(parse(part.view).index) if part.view else 0
            if part.hf.count("*") + free != stars:
                raise MappingError(
                    f"{self.megatron_param} has {stars} wildcards, {part.hf} has {part.hf.count('*')}"
                    + (f" and an index in `{part.view}`" if free else "")
                    + ": write the same number of * in both, so that each stands for one thing"
                )

    @property
    def is_expert(self) -> bool:
        return ".experts." in self.megatron_param

    @property
    def hf_param(self) -> str | dict[str, str]:
        """The Hugging Face name, or the names by position when there are several."""
        return self.parts[0].hf if len(self.parts) == 1 else {str(i): p.hf for i, p in enumerate(self.parts)}

    def resolve(self, wildcards: Sequence[str]) -> tuple[Resolved, ...]:
        """The parts with their numbers filled in; a number the HF name has no * for becomes the view's index."""
        out = []
        for part in self.parts:
            stars = part.hf.count("*")
            name = part.hf
            for value in wildcards[:stars]:
                name = name.replace("*", value, 1)
            index = dict(zip(parse(part.view).index if part.view else (), map(int, wildcards[stars:]), strict=True))
            out.append(Resolved(name, part.view, tuple(index.items())))
        return tuple(out)


@dataclass(frozen=True)
class Resolved:
    """A part of one concrete parameter."""

    hf: str
    view: str | None
    index: tuple[tuple[str, int], ...] = ()


class ReplicatedMapping(ParamMapping):
    """The same tensor on every tensor-parallel rank."""

    def __init__(self, megatron_param: str, hf_param: str):
        super().__init__(megatron_param, (Part(hf_param, None),), sharding=REPLICATED)


class ColumnParallelMapping(ParamMapping):
    """Rows cut evenly over tensor parallel."""

    def __init__(self, megatron_param: str, hf_param: str):
        vector = megatron_param.rstrip("0123456789*").endswith((".bias", "softmax_offset"))
        vocab = megatron_param.endswith(("word_embeddings.weight", "output_layer.weight"))
        view = "v i -> v ; ; i" if vocab else "o -> o ; ;" if vector else "o i -> o ; ; i"
        sizes: dict[str, int | str] = {"v": "vocab_size"} if vocab else {}  # Megatron may hold more rows, HF may not
        super().__init__(megatron_param, (Part(hf_param, view),), padded=vocab, sizes=sizes)


class RowParallelMapping(ParamMapping):
    """Columns cut evenly over tensor parallel."""

    def __init__(self, megatron_param: str, hf_param: str):
        super().__init__(megatron_param, (Part(hf_param, "o (t i) -> t ; o ; i"),), sharding=ROW)


class AutoMapping(ParamMapping):
    """One tensor, sharded as Megatron-Core shards the module that its name ends in."""

    def __init__(self, megatron_param: str, hf_param: str):
        name = megatron_param.replace("*", "0")
        sharding = next((s for pattern, s in _MEGATRON_SHARDING if re.search(pattern, name)), None)
        if sharding is None:
            raise MappingError(
                f"{megatron_param}: AutoMapping does not know how Megatron shards this module; use "
                "ColumnParallelMapping, RowParallelMapping or ReplicatedMapping"
            )
        kind = {COLUMN: ColumnParallelMapping, ROW: RowParallelMapping, REPLICATED: ReplicatedMapping}[sharding]
        self.__dict__.update(kind(megatron_param, hf_param).__dict__)
        self.__post_init__()


def _bias(name: str) -> bool:
    return name.endswith(".bias")


class QKVMapping(ParamMapping):
    """q, k and v side by side per query group: g groups of n query heads, each d channels."""

    def __init__(self, megatron_param: str, q: str, k: str, v: str):
        h = "" if _bias(megatron_param) else " h"
        super().__init__(
            megatron_param,
            (
                Part(q, f"(g n d){h} -> g ; n d ;{h}"),
                Part(k, f"(g d){h} -> g ; d ;{h}"),
                Part(v, f"(g d){h} -> g ; d ;{h}"),
            ),
            sizes=dict(_ATTENTION_SIZES),
        )


class ConcatenatedQKVMapping(ParamMapping):
    """One HF tensor that holds [all q | all k | all v] rows (Phi-3, Bailing)."""

    def __init__(self, megatron_param: str, hf_param: str):
        h = "" if _bias(megatron_param) else " h"
        super().__init__(
            megatron_param,
            tuple(
                Part(hf_param, f"([{q}g n d | {k}g d | {v}g d]){h} -> g ; {f} ;{h}")
                for q, k, v, f in (("*", "", "", "n d"), ("", "*", "", "d"), ("", "", "*", "d"))
            ),
            sizes=dict(_ATTENTION_SIZES),
        )


_ATTENTION_SIZES = {"g": "num_query_groups", "n": "heads_per_group", "d": "kv_channels"}


class GatedMLPMapping(ParamMapping):
    """gate and up, each cut over tensor parallel, then side by side."""

    def __init__(self, megatron_param: str, gate: str, up: str):
        h = "" if _bias(megatron_param) else " h"
        super().__init__(megatron_param, tuple(Part(hf, f"(t f){h} -> t ; f ;{h}") for hf in (gate, up)))


class ConcatenatedGatedMLPMapping(ParamMapping):
    """One HF tensor that holds [gate | up] rows (Phi-3)."""

    def __init__(self, megatron_param: str, hf_param: str):
        h = "" if _bias(megatron_param) else " h"
        super().__init__(
            megatron_param,
            tuple(Part(hf_param, f"([{one}]){h} -> t ; f ;{h}") for one in ("*t f | t f", "t f | *t f")),
        )


class SwappedColumnsMapping(ParamMapping):
    """The two halves of a column-parallel weight's columns change places."""

    def __init__(self, megatron_param: str, hf_param: str):
        second, first = "o ([h | *h]) -> o ; ; h", "o ([*h | h]) -> o ; ; h"
        super().__init__(megatron_param, (Part(hf_param, second), Part(hf_param, first)), side_by_side=True)


def _occur(mapping: ParamMapping, names: Collection[str]) -> bool:
    """Does each of the mapping's tensors occur, for some number in the place of each *?"""
    patterns = {re.escape(part.hf).replace(r"\*", r"\d+") for part in mapping.parts}
    return all(any(re.fullmatch(pattern, name) for name in names) for pattern in patterns)


class MegatronMappingRegistry:
    """The mappings of one model, found by Megatron name. The first that matches wins.

    Patterns are compiled once, here: to change mappings build a new registry, `type(registry)(*mappings)`.
    """

    def __init__(self, *mappings: ParamMapping):
        for mapping in mappings:
            if not isinstance(mapping, ParamMapping):
                raise MappingError(f"a registry takes mappings, one by one; got {type(mapping).__name__}")
        self.mappings = list(mappings)
        self._exact: dict[str, ParamMapping] = {}
        self._patterns: list[tuple[re.Pattern, ParamMapping]] = []
        for mapping in mappings:
            mapping.__post_init__()  # a renamed copy may have lost a wildcard
            if "*" in mapping.megatron_param:
                regex = re.escape(mapping.megatron_param).replace(r"\*", r"(\d+)")
                self._patterns.append((re.compile(regex), mapping))
            else:
                self._exact.setdefault(mapping.megatron_param, mapping)

    def for_tensors(self, names: Collection[str]) -> MegatronMappingRegistry:
        """The registry for a checkpoint that holds the tensors `names`: variants whose tensors do not occur are left out,
        unless no variant's do; then the first stands for all in what errors say."""
        found = [m for m in self.mappings if not m.variant or _occur(m, names)]
        known = {m.megatron_param for m in found}
        return type(self)(*found, *(m for m in self.mappings if m.megatron_param not in known))

    def __iter__(self) -> Iterator[ParamMapping]:
        return iter(self.mappings)

    def __len__(self) -> int:
        return len(self.mappings)

    def megatron_to_hf_lookup(self, name: str) -> tuple[ParamMapping, tuple[Resolved, ...]]:
        """The mapping of a Megatron parameter and its parts. MappingError names the parameter and the nearest pattern."""
        if mapping := self._exact.get(name):
            return mapping, mapping.resolve(())
        for pattern, mapping in self._patterns:
            if match := pattern.fullmatch(name):
                return mapping, mapping.resolve(match.groups())
        known = [m.megatron_param for m in self.mappings]
        near = difflib.get_close_matches(re.sub(r"\d+", "*", name), known, n=1, cutoff=0)
        raise MappingError(
            f"no mapping for Megatron parameter {name}"
            + (f"; the nearest is {near[0]}" if near else "")
            + ". Add it to the bridge's mapping_registry()"
        )
