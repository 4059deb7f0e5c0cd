"""What `goldengate plan` does: the proof by metadata that a model converts in a layout, and what each rank then holds.

Needs a config and nothing else: Megatron-Core builds every stage on the meta device, Hugging Face's class (or, where
transformers has none, the bridge) says which tensors a checkpoint has.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bridges import AutoBridge, Layout
from bridges.checkpoints.reader import Checkpoint
from bridges.conversion.mapping import MappingError
from bridges.conversion.plan import PlanError, Shape, shard_of
from bridges.conversion.proof import Census, Coverage, Held, prove_ranks
from bridges.conversion.shapes import tensors_of
from bridges.providers.skeleton import holdings
from harness import forked
from harness.flops.command import load_bridge

Place = tuple[int, int]  # pipeline rank, expert rank
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class RankMemory:
    """One rank of those that hold the same: it keeps `bytes`, reads `reads` bytes of the source, and while it imports has
    at most `peak` bytes: its parameters and every page of the files that it has read."""

    rank: int
    stage: int
    expert_rank: int
    parameters: int
    bytes: int
    reads: int
    peak: int


@dataclass(frozen=True)
class Plan:
    """The proof for one layout, the tensors that a checkpoint has, the memory of ranks at tensor rank 0, and (name, shape) of
    what they hold."""

    layout: Layout
    coverage: Coverage
    names_from: str
    tensors: int
    tensor_bytes: int
    dtype: str
    ranks: list[RankMemory]
    held: dict[Place, list[tuple[str, Shape]]]

    @property
    def largest(self) -> RankMemory:
        return max(self.ranks, key=lambda rank: rank.peak)

    @property
    def slowest(self) -> RankMemory:
        """The rank that reads most: an import takes as long as it does."""
        return max(self.ranks, key=lambda rank: rank.reads)

    def as_dict(self) -> dict[str, Any]:
        return {
            "layout": str(self.layout),
            "world_size": self.layout.world_size,
            "proven": self.coverage.ok,
            "proof": asdict(self.coverage),
            "hf": {"tensors": self.tensors, "bytes": self.tensor_bytes, "names_from": self.names_from},
            "dtype": self.dtype,
            "largest": asdict(self.largest),
            "slowest": asdict(self.slowest),
            "ranks": [asdict(rank) for rank in self.ranks],
        }


def plan(source: str, layout: Layout | str, dtype: str | None = None) -> Plan:
    """The plan of a row, a config.json, or a folder with one, in its dtype or another. Runs in a forked process, since fake
    process groups are for good.

    Raises GoldengateError for a source that cannot be read, a config without a bridge, and a layout that does not divide.
    """
    if dtype is not None and dtype not in DTYPES:
        raise PlanError(f"--dtype {dtype}: {', '.join(DTYPES)} are known")
    return forked.run(lambda: make(load_bridge(source), Layout.parse(layout), dtype))


def make(bridge: AutoBridge, layout: Layout, dtype: str | None = None) -> Plan:
    """The plan, in this process, which gets fake process groups."""
    provider = bridge.to_megatron_provider(load_weights=False)
    if dtype is not None:
        provider.params_dtype = DTYPES[dtype]
        provider.bf16, provider.fp16 = dtype == "bfloat16", dtype == "float16"
    provider.apply_layout(layout).finalize()
    held = list(holdings(provider, layout))
    tensors, names_from = _tensors(bridge, provider, layout, held)
    checkpoint: Any = SimpleNamespace(tensors={name: SimpleNamespace(shape=shape) for name, shape in tensors.items()})
    registry = bridge.mapping_registry(checkpoint)
    repeated = bridge.repeated_tensors(checkpoint, provider, registry)
    coverage = prove_ranks(held, registry, bridge.mapped_shapes(checkpoint), provider, layout, repeated)
    itemsize = provider.params_dtype.itemsize
    return Plan(
        layout,
        coverage,
        names_from,
        len(tensors),
        sum(_numel(shape) for shape in tensors.values()) * itemsize,
        str(provider.params_dtype).removeprefix("torch."),
        _memory(held, layout, itemsize),
        {place: [(one.name, one.shape) for one in parameters] for place, parameters in held},
    )


def _numel(shape: Shape) -> int:
    return torch.Size(shape).numel()


def _memory(held: Sequence[tuple[Place, Sequence[Held]]], layout: Layout, itemsize: int) -> list[RankMemory]:
    first: dict[Place, int] = {}
    for rank in range(layout.world_size):
        at = layout.coords(rank)
        first.setdefault((at.pp, at.ep), rank)
    found = []
    for place, parameters in held:
        size = sum(one.nbytes for one in parameters)
        reads = sum(_numel(one.shape) for one in parameters) * itemsize
        found.append(RankMemory(first[place], *place, len(parameters), size, reads, size + reads))
    return found


# -- the Hugging Face side ---------------------------------------------------------------------------------------------


def _tensors(
    bridge: AutoBridge, provider: Any, layout: Layout, held: Sequence[tuple[Place, Sequence[Held]]]
) -> tuple[dict[str, Shape], str]:
    """({tensor: shape} of the model's checkpoint, who says so): the files of a folder, else transformers' class, else the
    bridge's own declarations. transformers has no multi-token prediction: those tensors are the bridge's word too."""
    path = bridge.hf_pretrained.path
    if path is not None and any(path.glob("*.safetensors")):
        return {n: info.shape for n, info in Checkpoint.open(path).tensors.items()}, "the folder's files"
    config = bridge.hf_pretrained.config
    census = Census(layout, provider.share_embeddings_and_output_weights)
    for place, parameters in held:
        census.add(place, parameters)
    kind = type(config).model_type  # the file may say another: kimi_k2 is read as deepseek_v3
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return _by_bridge(bridge, provider, layout, census, ""), "names from the bridge alone"
    published, in_memory = _by_class(config)
    found = published
    if published.keys() != in_memory.keys():
        asked = _by_bridge(bridge, provider, layout, census, "", strict=False).keys()
        found = in_memory if len(asked & in_memory.keys()) > len(asked & published.keys()) else published
    alone = {n: s for n, s in _by_bridge(bridge, provider, layout, census, "mtp.").items() if n not in found}
    names_from = f"transformers' {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]}"
    if alone:
        names_from += f"; {len(alone)} of multi-token prediction from the bridge alone"
    return {**found, **alone}, names_from


def _by_class(config: Any) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """({tensor: shape} as published, as transformers has them in memory)."""
    config = copy.deepcopy(config)
    config.model_type = type(config).model_type  # by this name transformers knows how its tensors are published
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = set(model.all_tied_weights_keys) if getattr(config, "tie_word_embeddings", False) else set()
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    published, in_memory = revert_weight_conversion(model, dict(state)), state
    return _shapes(published), _shapes(in_memory)


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _by_bridge(
    bridge: AutoBridge, provider: Any, layout: Layout, census: Census, prefix: str, *, strict: bool = True
) -> dict[str, Shape]:
    """{tensor: shape} that the bridge's declarations ask for, of the parameters whose names start with `prefix`."""
    registry, found = bridge.mapping_registry(), {}
    for name in census.primary:
        if not name.startswith(prefix):
            continue
        try:
            mapping, parts = registry.megatron_to_hf_lookup(name)
        except MappingError:
            continue  # the proof says so
        size = shard_of(mapping, layout, layout.coords(0)).size
        try:
            found |= tensors_of(name, mapping, parts, provider, size, census.shapes[name])
        except PlanError:  # of which shape a tensor is cannot always be told from its declaration
            if strict:
                raise
    return found


# -- print -------------------------------------------------------------------------------------------------------------


def human(size: int) -> str:
    """Bytes in four digits and a unit."""
    value, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.4g} {units[0]}"


def lines(found: Plan, errors: int = 10) -> list[str]:
    """The plan for a terminal; `errors`: how many of them."""
    c, layout = found.coverage, found.layout
    out = [
        f"{'proven' if c.ok else 'NOT PROVEN'} in {layout}: {layout.world_size:,} ranks, "
        f"{layout.pp} stages x {layout.ep} expert ranks",
        f"  Hugging Face  {found.tensors:,} tensors, {c.hf_elements:,} elements once each, "
        f"{human(found.tensor_bytes)} in {found.dtype} ({found.names_from})",
        f"  Megatron      {c.megatron_parameters:,} shards, {c.megatron_elements:,} elements, {c.copies:,} copies",
    ]
    for title, rank in (("largest rank", found.largest), ("slowest rank", found.slowest)):
        out.append(
            f"  {title}  {rank.rank} (stage {rank.stage}, expert rank {rank.expert_rank}): {human(rank.bytes)} of "
            f"parameters, reads {human(rank.reads)}, at most {human(rank.peak)} while importing"
        )
    by_stage: dict[int, list[RankMemory]] = {}
    for rank in found.ranks:
        by_stage.setdefault(rank.stage, []).append(rank)
    for stage, ranks in by_stage.items():
        top = max(ranks, key=lambda rank: rank.peak)
        out.append(f"  stage {stage:<3} {top.parameters:>6,} parameters a rank, {human(top.bytes):>10} a rank")
    out += [f"  error: {error}" for error in c.errors[:errors]]
    if len(c.errors) > errors:
        out.append(f"  and {len(c.errors) - errors:,} more errors (--json has all)")
    return out
