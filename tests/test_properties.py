"""Properties of the product's own import, export, live export and choice of writers, in any layout, for any mapping, dtype
and family. tests/test_property_changes.py shows that a change of one line in them turns a property red."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import toy_models
from bridges import AutoBridge, Layout, MegatronMappingRegistry, PlanError
from bridges.conversion import tasks, transfer
from bridges.conversion.mapping import EMBEDDING, OUTPUT, REPLICATED, ColumnParallelMapping
from bridges.conversion.proof import Parameter, local_shape
from harness.checks.complete import expected_on
from harness.ranks import jobs
from tests import simulated
from tests.strategies import CONVERSIONS, FAMILIES, Conversion, conversions, family_configs, layouts_of_size, values

QUICK = settings(max_examples=15, deadline=None)
FEW = settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))

# -- one mapping in any layout ---------------------------------------------------------------------------------------------


@dataclass
class World:
    """A mapping's tensors on all ranks of a layout, and where they came from."""

    case: Conversion
    layout: Layout
    dtype: torch.dtype
    source: simulated.Source
    ranks: list[simulated.Rank]


AGAIN = "again."  # what the second copies of tensors are called


def a_world(data: st.DataObject, kind: str) -> World:
    """Any mapping of a kind, any layout that fits it, any dtypes that widen, some tensors repeated on disk; the parameter on
    any pipeline stage (on all: replicas of the whole model)."""
    case = data.draw(conversions(kind))
    experts = len(case.names) if case.mapping.is_expert else 0
    layout = data.draw(layouts_of_size(case.tps, experts))
    dtype, wider = data.draw(st.sampled_from(WIDENING))
    hf = values(case.hf_shapes, dtype)
    repeated = {AGAIN + name: name for name in data.draw(st.sets(st.sampled_from(sorted(hf))))}
    hf |= {again: hf[name].clone() for again, name in repeated.items()}
    registry = MegatronMappingRegistry(case.mapping)
    # An embedding on a later stage is a second copy, see below.
    stage = 0 if kind == "vocabulary" else data.draw(st.integers(0, layout.pp - 1))

    def held(coords):
        names = case.names
        if coords.pp != stage:
            return
        if experts:
            names = [case.names[e] for e in layout.experts(coords.ep, experts)]
        for name in names:
            mapping, _ = registry.megatron_to_hf_lookup(name)
            size = 1 if mapping.sharding == REPLICATED else layout.expert_tp if mapping.is_expert else layout.tp
            yield name, simulated.poison(local_shape(mapping, case.shape, size), wider)

    provider = SimpleNamespace(
        share_embeddings_and_output_weights=False, vocab_size=case.hf_shapes.get("embed", (0,))[0], **provider_of(case)
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in hf.items()}
    return World(
        case, layout, dtype, simulated.Source(hf), simulated.ranks(layout, registry, shapes, provider, held, repeated)
    )


WIDENING = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float64),
]


def provider_of(case: Conversion) -> dict[str, int]:
    """The provider's attributes that the mapping's symbols are read from."""
    wanted = {"num_query_groups": "g", "heads_per_group": "n", "kv_channels": "d"}
    return {attribute: case.dims[symbol] for attribute, symbol in wanted.items()}


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    as_bytes = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (found, expected))
    return found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(*as_bytes)


def every_element_is_imported_and_exported_once(data: st.DataObject, kind: str) -> None:
    """No NaN is left but padding, which is zero; the export holds the source's bits, each element written by one rank, and
    `written` names every tensor, second copies too."""
    world = a_world(data, kind)
    simulated.imported(world.ranks, world.source)
    for rank in world.ranks:
        assert not any(tensor.isnan().any() for tensor in rank.tensors.values())
    check_export(world.ranks, world.source)


def check_export(world: list[simulated.Rank], source) -> None:
    whole, times = simulated.exported(world, source)
    for name in source.tensors:
        assert (times[name] == 1).all(), f"{name}: elements written {times[name].unique().tolist()} times"
        assert same_bits(whole[name], source.view(name)), name
    writers = [transfer.written(rank.tasks, rank.coords) for rank in world]
    assert set().union(*writers) == set(source.tensors)


def replicas_hold_the_same(data: st.DataObject, kind: str) -> None:
    """Ranks that differ on axes that do not cut a parameter hold the same bits; the shards laid out over tensor parallel are
    those of a layout without the other axes."""
    world = a_world(data, kind)
    simulated.imported(world.ranks, world.source)
    seen: dict = {}
    for rank in world.ranks:
        for name, tensor in rank.tensors.items():
            at = rank.coords.etp if world.case.mapping.is_expert else rank.coords.tp
            shard = 0 if world.case.mapping.sharding == REPLICATED else at
            assert same_bits(tensor, seen.setdefault((name, shard), tensor))
    cut = world.layout.expert_tp if world.case.mapping.is_expert else world.layout.tp
    assert len(seen) == len(world.case.names) * (1 if world.case.mapping.sharding == REPLICATED else cut)
    padding = world.case.shape[0] - world.source.tensors["embed"].shape[0] if world.case.mapping.padded else 0
    if padding:
        last = seen[world.case.names[0], cut - 1]
        assert not last[max(len(last) - padding, 0) :].any()


def a_live_export_is_the_source(data: st.DataObject, kind: str) -> None:
    """On every rank, in the source's order, bit for bit; what is ignored comes as it is."""
    world = a_world(data, kind)
    simulated.imported(world.ranks, world.source)
    for found in simulated.exported_live(world.ranks, world.source):
        assert [name for name, _ in found] == list(world.source.tensors)
        assert all(same_bits(tensor, world.source.view(name)) for name, tensor in found)


def narrowing_is_refused_and_copies_must_agree(data: st.DataObject, kind: str) -> None:
    """fp32 into bf16 is an error unless it is allowed; a second copy with other bits is an error that names it."""
    world = a_world(data, kind)
    narrow = [task for rank in world.ranks for task in rank.tasks][:1]
    wide = simulated.Source({n: world.source.view(n).double() + 1 / 3 for n in world.source.tensors})
    narrow[0].tensor = narrow[0].tensor.to(torch.bfloat16)
    with pytest.raises(PlanError, match="precision would be lost"):
        transfer.import_weights(narrow, wide)
    transfer.import_weights(narrow, wide, lossy=True)
    world = a_world(data, kind)
    again = next((n for n in world.source.tensors if n.startswith(AGAIN)), None)
    if again and world.source.view(again).numel():
        world.source.view(again).view(-1)[-1] += 1
        with pytest.raises(PlanError, match=f"{again} differs from {again.removeprefix(AGAIN)}"):
            simulated.imported(world.ranks, world.source)


PROPERTIES = {
    f.__name__: f
    for f in (
        every_element_is_imported_and_exported_once,
        replicas_hold_the_same,
        a_live_export_is_the_source,
        narrowing_is_refused_and_copies_must_agree,
    )
}


@pytest.mark.parametrize("kind", CONVERSIONS)
@pytest.mark.parametrize("name", PROPERTIES)
@QUICK
@given(data=st.data())
def test_property(name, kind, data):
    """See the property's own words."""
    PROPERTIES[name](data, kind)


# -- second embeddings and tied heads ----------------------------------------------------------------------------------------


def second_copies_are_imported_and_never_exported(data: st.DataObject, kind: str = "") -> None:
    """An embedding that a later stage holds again, and a tied head: filled with the embedding, written by nobody; a head that
    is on disk all the same is written once, from the embedding."""
    layout = data.draw(layouts_of_size((1, 2, 3, 4), 0))
    on_disk = data.draw(st.booleans())
    hf = values({"model.embed_tokens.weight": (data.draw(st.integers(1, 13)), 4)}, torch.float32)
    embed = hf["model.embed_tokens.weight"]
    hf |= {"lm_head.weight": embed.clone()} if on_disk else {}
    registry = MegatronMappingRegistry(
        ColumnParallelMapping(EMBEDDING, "model.embed_tokens.weight"),
        ColumnParallelMapping(OUTPUT, "lm_head.weight"),
    )
    shape = local_shape(registry.mappings[0], tuple(embed.shape), layout.tp)

    def held(coords):
        if coords.pp == 0 or coords.pp == layout.pp - 1:
            yield EMBEDDING, simulated.poison(shape, torch.float32)
        if coords.pp == layout.pp - 1 > 0:
            yield OUTPUT, simulated.poison(shape, torch.float32)

    provider = SimpleNamespace(share_embeddings_and_output_weights=True, vocab_size=len(embed))
    repeated = tasks.repeated_tensors({}, registry, hf, provider)
    assert repeated == ({"lm_head.weight": "model.embed_tokens.weight"} if on_disk else {})
    shapes = {name: tuple(tensor.shape) for name, tensor in hf.items()}
    world = simulated.ranks(layout, registry, shapes, provider, held, repeated)
    source = simulated.Source(hf)
    simulated.imported(world, source)
    for rank in world:
        expected = world[rank.coords.tp].tensors[EMBEDDING]
        assert all(same_bits(tensor, expected) for tensor in rank.tensors.values())
    check_export(world, source)


@QUICK
@given(data=st.data())
def test_second_copies_are_imported_and_never_exported(data):
    second_copies_are_imported_and_never_exported(data)


# -- names of what a rank holds ----------------------------------------------------------------------------------------------


class Experts(torch.nn.Module):
    def __init__(self, count: int):
        super().__init__()
        self.num_gemms = count
        for i in range(count):
            self.register_parameter(f"weight{i}", torch.nn.Parameter(torch.zeros(1)))


def a_chunk(layers: range, experts: int) -> torch.nn.Module:
    """Megatron's containers, numbered from 0 on every rank; a layer says which one it is."""
    chunk = torch.nn.Module()
    chunk.decoder = torch.nn.Module()
    chunk.decoder.layers = torch.nn.ModuleList()
    for number in layers:
        layer = torch.nn.Module()
        layer.layer_number = number + 1
        layer.mlp = torch.nn.Module()
        layer.mlp.experts = torch.nn.Module()
        layer.mlp.experts.linear_fc1 = Experts(experts)
        chunk.decoder.layers.append(layer)
    return chunk


def every_layer_and_expert_has_one_name(data: st.DataObject, kind: str = "") -> None:
    """The names of all ranks together are those of the whole model: every (layer, expert) on one (pp, ep), however stages,
    virtual stages and splits are."""
    layout = data.draw(layouts_of_size((1,), 12))
    count = data.draw(st.integers(layout.num_chunks, layout.num_chunks + 5)) if not layout.split else sum(layout.split)
    chunks, homes = layout.chunk_layers(count), {}
    for number in range(layout.world_size):
        at = layout.coords(number)
        mine = [a_chunk(chunks[c], 12 // layout.ep) for c in range(at.pp, layout.num_chunks, layout.pp)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tasks.parallel_state, "get_expert_model_parallel_rank", lambda at=at: at.ep)
            names = [name for name, _ in tasks.global_tensors(mine)]
        for name in names:
            homes.setdefault(name, set()).add((at.pp, at.ep))
        assert {int(n.rsplit("weight", 1)[1]) for n in names} <= set(layout.experts(at.ep, 12))
    assert set(homes) == {
        f"decoder.layers.{layer}.mlp.experts.linear_fc1.weight{e}" for layer in range(count) for e in range(12)
    }
    assert all(len(home) == 1 for home in homes.values())


@QUICK
@given(data=st.data())
def test_every_layer_and_expert_has_one_name(data):
    every_layer_and_expert_has_one_name(data)


# -- whole models --------------------------------------------------------------------------------------------------------


def built_on_one_rank(folder: str) -> list[tuple[str, tuple[int, ...]]]:
    """On a rank: what Megatron's model of a checkpoint holds."""
    jobs.use_layout(Layout())
    provider = AutoBridge.from_hf_pretrained(folder).to_megatron_provider(load_weights=False).finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    return [(name, tuple(tensor.shape)) for name, tensor in tasks.global_tensors(model)]


def whole_model(folder, layout: Layout, parameters: list[Parameter]) -> tuple[list[simulated.Rank], object]:
    """Every rank of a layout with the tasks of a checkpoint's model, as AutoBridge makes them."""
    bridge = AutoBridge.from_hf_pretrained(folder)
    source = bridge.hf_pretrained.checkpoint
    provider = bridge.to_megatron_provider(load_weights=False).apply_layout(layout)
    registry = bridge.mapping_registry(source)
    if provider.share_embeddings_and_output_weights and layout.pp > 1:
        shape = next(p.shape for p in parameters if p.name == EMBEDDING)
        parameters = [*parameters, Parameter(OUTPUT, shape)]

    def held(coords):
        rank = next(r for r in range(layout.world_size) if layout.coords(r) == coords)
        for name, shape in expected_on(rank, parameters, registry, provider, layout).items():
            yield name, simulated.poison(shape, torch.float32)

    repeated = bridge.repeated_tensors(source, provider, registry)
    world = simulated.ranks(layout, registry, bridge.mapped_shapes(source), provider, held, repeated)
    return world, source


@pytest.mark.parametrize("family", FAMILIES)
@FEW
@given(data=st.data())
def test_any_model_of_a_family_in_any_layout(family, data, ranks, tmp_path_factory):
    """A valid config of the family with other dims, groups, experts, layers and heads of MTP: its checkpoint comes home from
    any layout, each element written once. The names and shapes are those of the model that Megatron builds."""
    config, layout = data.draw(family_configs(family))
    with toy_models.guests({"drawn": {key: value for key, value in config.items() if key != "_base"}}):
        folder = toy_models.write("drawn", tmp_path_factory.mktemp("drawn"), shards=1)
    ranks.use_for(Layout())
    [held] = ranks.run(1, built_on_one_rank, str(folder))
    world, source = whole_model(folder, layout, [Parameter(name, shape) for name, shape in held])
    simulated.imported(world, source)
    for rank in world:
        assert not [name for name, tensor in rank.tensors.items() if tensor.isnan().any()], config
    check_export(world, source)
