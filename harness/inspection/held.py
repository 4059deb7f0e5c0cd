"""What Megatron holds of a model: its parameters on the meta device, and how many bytes of them each GPU of a layout has.

The model is built once, whole; which part of a parameter a rank of another layout holds follows from its mapping. A test
compares the sums with what Megatron builds in those layouts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import gcd, prod
from typing import Any

from bridges import AutoBridge, Layout, LayoutError
from bridges.conversion.mapping import REPLICATED, MappingError, MegatronMappingRegistry
from bridges.conversion.proof import is_vocabulary
from bridges.conversion.walk import walk_of
from bridges.errors import GoldengateError
from bridges.providers.skeleton import holdings
from harness import forked

Shape = tuple[int, ...]
NODE = 8  # GPUs that tensor parallelism spreads over at most
GRADIENT, OPTIMIZER = 4, 12  # bytes of a parameter: fp32; fp32 master, first and second moment
CONVENTION = (
    "bf16 parameters (2 bytes), fp32 gradients (4), Adam with fp32 master weights and moments (12) on every GPU; with "
    "Megatron's distributed optimizer: the last column. No activations, no buffers of communication."
)


class FitError(GoldengateError, ValueError):
    """Numbers that no cluster has: the message names them."""


@dataclass(frozen=True)
class Held:
    """{parameter by Megatron's name: shape} of the whole model, and the bridge's word on each."""

    shapes: dict[str, Shape]
    registry: MegatronMappingRegistry
    provider: Any

    @property
    def sizes(self) -> dict[str, int]:
        """{parameter: elements}; the head of a tied model is its embedding."""
        return {name: prod(shape) for name, shape in self.shapes.items()}

    def tensors(self) -> dict[str, str]:
        """{Hugging Face tensor: the Megatron parameter that is made of it}, of those that have a mapping."""
        found = {}
        for name in self.shapes:
            try:
                _, parts = self.registry.megatron_to_hf_lookup(name)
            except MappingError:
                continue
            found |= {part.hf: name for part in parts}
        return found


def whole(bridge: AutoBridge, names: Any = None) -> Held:
    """Return what one rank alone would hold. `names`: a checkpoint, whose tensors decide between forms of a family.

    Raises what plans raise; see harness.forked.
    """

    def build() -> dict[str, Shape]:
        provider = bridge.to_megatron_provider(load_weights=False).apply_layout("tp1").finalize()
        return {one.name: one.shape for _, held in holdings(provider, Layout()) for one in held}

    provider = bridge.to_megatron_provider(load_weights=False)
    return Held(forked.run(build), bridge.mapping_registry(names), provider)


@dataclass(frozen=True)
class Fit:
    """The GPU of a layout that has most: parameters, and bytes of them, their gradients and the optimizer's state.
    `optimizer_distributed`: that with Megatron's distributed optimizer."""

    layout: str
    dp: int
    elements: int
    parameters: int
    gradients: int
    optimizer: int
    optimizer_distributed: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def fits(held: Held, gpus: int, gib: float) -> list[Fit]:
    """Return the layouts of `gpus` GPUs of `gib` GiB each in which parameters, gradients and optimizer fit, those that
    cut the model least first. Empty when there is none; see `smallest`."""
    limit = gib * 2**30
    found = [fit for fit in _all_fits(held, gpus, gib) if fit.total <= limit]
    return sorted(found, key=lambda fit: (gpus // fit.dp, Layout.parse(fit.layout).pp, fit.total))


def smallest(held: Held, gpus: int) -> Fit | None:
    """Return the layout of these GPUs that needs least of each, None when the model divides into none."""
    return min(_all_fits(held, gpus, 1), key=lambda fit: fit.total, default=None)


def _all_fits(held: Held, gpus: int, gib: float) -> list[Fit]:
    if gpus < 1 or gib <= 0:
        raise FitError(f"--gpus {gpus} --memory {gib:g}: at least one GPU and some memory are needed")
    sums = Sums(held)
    return [sums.fit(layout) for layout in layouts_of(held.provider, gpus)]


def layouts_of(provider: Any, gpus: int) -> Iterator[Layout]:
    """Yield the layouts that use these GPUs and into which the model divides: tensor parallel within a node, experts whole."""
    experts = provider.num_moe_experts or 1
    for tp in _divisors(gpus, NODE):
        for pp in _divisors(gpus // tp, provider.num_layers):
            for ep in _divisors(gcd(experts, gpus // pp), experts):
                try:
                    layout = Layout(
                        tp=tp, pp=pp, ep=ep, etp=1 if provider.num_moe_experts else None, dp=gpus // (tp * pp)
                    )
                    # A provider keeps the sizes that it is asked with.
                    provider.apply_layout(layout).check_layout()
                except LayoutError:
                    continue
                yield layout


def _divisors(number: int, limit: int) -> list[int]:
    return [n for n in range(1, min(number, limit) + 1) if number % n == 0]


class Sums:
    """Elements by where they are (a decoder layer, the first stage, the last) and how they are cut."""

    def __init__(self, held: Held):
        self.provider = held.provider
        self.sums: dict[int | str, Counter[str]] = {}
        self.vocabulary: list[tuple[str, Shape]] = []
        self.walk = walk_of(held.provider)
        for name, shape in held.shapes.items():
            self._add(held.registry, name, shape)

    def _add(self, registry: MegatronMappingRegistry, name: str, shape: Shape) -> None:
        if is_vocabulary(name):
            self.vocabulary.append((name, shape))
            return
        try:
            mapping, _ = registry.megatron_to_hf_lookup(name)
            whole = mapping.sharding == REPLICATED
        except MappingError:
            whole = True
        at = self.walk.layer_of(name)
        kind = "expert" if ".experts." in name else "whole" if whole else "cut"
        self.sums.setdefault("last" if at is None else at, Counter())[kind] += prod(shape)

    def fit(self, layout: Layout) -> Fit:
        dense, routed = max((self.elements(layout, stage) for stage in range(layout.pp)), key=sum)
        text = str(layout) if layout.world_size == layout.tp * layout.pp else _with_dp(layout)
        all_ = dense + routed
        # Experts are kept by fewer ranks alike: those of one place in expert and tensor parallelism.
        alike = max(1, layout.world_size // (layout.expert_tp * layout.ep * layout.pp))
        shared = -(-OPTIMIZER * dense // layout.dp) - (-OPTIMIZER * routed // alike)
        return Fit(text, layout.dp, all_, 2 * all_, GRADIENT * all_, OPTIMIZER * all_, shared)

    def elements(self, layout: Layout, stage: int) -> tuple[int, int]:
        """Return (all but routed experts, routed experts): elements on each rank of a stage."""
        places: list[int | str] = list(layout.chunk_layers(self.provider.num_layers)[stage])
        first, last = stage == 0, stage == layout.pp - 1
        found = sum((self.sums.get(place, Counter()) for place in [*places, *(["last"] if last else [])]), Counter())
        dense = found["whole"] + found["cut"] // layout.tp
        for name, (rows, *rest) in self.vocabulary:
            output = name == self.walk.output_weight
            # The last stage of a tied model, or one with multi-token prediction, has a copy of the embedding.
            again = not output and last and self.provider.share_embeddings_and_output_weights
            again |= not output and last and bool(self.provider.mtp_num_layers)
            if (last if output else first) or again:
                dense += -(-rows // layout.tp) * prod(rest)
        return dense, found["expert"] // (layout.ep * layout.expert_tp)


def _with_dp(layout: Layout) -> str:
    text = str(layout)
    return text if f"dp{layout.dp}" in text.split("-") else f"{text}-dp{layout.dp}"


def missing_and_unknown(held: Held, tensors: Mapping[str, Any], ignored: set[str]) -> tuple[list[str], list[str]]:
    """Return (tensors that a parameter is made of and that are not there, those that no mapping knows), sorted."""
    wanted = held.tensors()
    return sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted) - ignored)
