"""The check `complete`: every tensor and every parameter exactly once."""

from __future__ import annotations

from bridges import Layout
from bridges.conversion.plan import shard_of
from bridges.conversion.proof import Held, Parameter, local_shape, prove_ranks
from bridges.conversion.walk import walk_of
from harness.checks.outcome import Outcome, first_few
from harness.checks.subject import Bench


def check_complete(bench: Bench) -> Outcome:
    """Every HF tensor and every Megatron parameter and buffer exactly once: the proof on metadata for the layout, the
    real ranks' names and shapes against the pure functions, and no NaN left of the poison."""
    subject, layout = bench.subject, bench.layout
    registry = subject.auto_bridge.mapping_registry(subject.source)
    provider = subject.auto_bridge.to_megatron_provider(load_weights=False).apply_layout(layout)
    shapes = subject.auto_bridge.mapped_shapes(subject.source)
    faults: list[str] = []

    parameters = unsharded(bench, registry)
    repeated = subject.auto_bridge.repeated_tensors(subject.source, provider, registry)
    held, differing = holdings(bench)
    coverage = prove_ranks(held.items(), registry, shapes, provider, layout, repeated)
    faults += differing + coverage.errors
    for rank, built in enumerate(bench.built):
        expected = expected_on(rank, parameters, registry, provider, layout)
        actual = {name: shape for name, shape, _ in built.parameters}
        for name in sorted({*expected, *actual}):
            if expected.get(name) != actual.get(name):
                faults.append(f"rank {rank}: {name} is {actual.get(name)}, by layout it should be {expected.get(name)}")
        faults += [f"rank {rank}: {name} was not written by the import" for name in built.unwritten]
    detail = first_few(faults)
    counted = (
        f"{coverage.hf_tensors} tensors, {coverage.hf_elements} elements once each; "
        f"{sum(len(b.parameters) for b in bench.built)} parameters on {layout.world_size} ranks"
    )
    if ignored := subject.auto_bridge.ignored_tensors(subject.source):
        counted += f"; {len(ignored)} tensors ignored, as the bridge says"
    return Outcome(not faults and coverage.ok, len(faults), 0, "faults", detail or counted)


def holdings(bench: Bench) -> tuple[dict[tuple[int, int], list[Held]], list[str]]:
    """({(pipeline rank, expert rank): what its ranks really hold}, the ranks that do not hold what others there do)."""
    held: dict[tuple[int, int], list[Held]] = {}
    faults = []
    for rank, built in enumerate(bench.built):
        here = [Held(name, tuple(shape)) for name, shape, _ in built.parameters]
        place = (built.coords.pp, built.coords.ep)
        if held.setdefault(place, here) != here:
            faults.append(
                f"rank {rank} holds other names or shapes than the ranks before it at (stage, expert rank) {place}"
            )
    return held, faults


def unsharded(bench: Bench, registry) -> list[Parameter]:
    """The parameters of the whole model, put together from what the ranks hold."""
    walk = walk_of(bench.subject.auto_bridge.to_megatron_provider(load_weights=False))
    whole: dict[str, tuple[int, ...]] = {}
    for built in bench.built:
        for name, shape, _ in built.parameters:
            lookup = walk.embedding_weight if name == walk.output_weight else name
            mapping, _ = registry.megatron_to_hf_lookup(lookup)
            size = shard_of(mapping, bench.layout, built.coords).size
            dim = 1 if mapping.sharding == "row" else 0
            whole[name] = tuple(s * size if d == dim else s for d, s in enumerate(shape))
    return [Parameter(name, shape) for name, shape in whole.items()]


def expected_on(rank: int, parameters, registry, provider, layout: Layout) -> dict[str, tuple[int, ...]]:
    """What the pure functions say this rank holds: {parameter: local shape}."""
    coords = layout.coords(rank)
    chunks = layout.chunk_layers(provider.num_layers)
    mine = {layer for c, layers in enumerate(chunks) if c % layout.pp == coords.pp for layer in layers}
    first, last = coords.pp == 0, coords.pp == layout.pp - 1
    tied, heads = provider.share_embeddings_and_output_weights, bool(provider.mtp_num_layers)
    experts = layout.experts(coords.ep, provider.num_moe_experts) if provider.num_moe_experts else range(0)
    walk, held = walk_of(provider), {}
    for parameter in parameters:
        name = parameter.name.removeprefix(walk.model)
        head, layer = name.partition(".")[0], walk.layer_of(parameter.name)
        if name.startswith(f"{walk.embedding}."):
            here = first or (last and heads)  # the heads of multi-token prediction look tokens up themselves
        elif name.startswith(f"{walk.output}."):
            here = last and not (tied and (first or heads))
        elif head == "mtp":
            here = last
        elif layer is not None:
            here = layer in mine
        elif heads:  # then the final norm is where the last decoder layer is
            here = provider.num_layers - 1 in mine
        else:
            here = last
        lookup = walk.embedding_weight if parameter.name == walk.output_weight else parameter.name
        mapping, _ = registry.megatron_to_hf_lookup(lookup)
        if here and mapping.is_expert:
            number = parameter.name[len(parameter.name.rstrip("0123456789")) :]
            here = int(number) in experts
        if here:
            held[parameter.name] = local_shape(mapping, parameter.shape, shard_of(mapping, layout, coords).size)
    return held
