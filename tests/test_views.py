"""View expressions, named mappings and the registry: what they mean, and what their errors say."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bridges import (
    AutoMapping,
    ColumnParallelMapping,
    ConcatenatedQKVMapping,
    GatedMLPMapping,
    MappingError,
    MegatronMappingRegistry,
    ParamMapping,
    Part,
    QKVMapping,
    ReplicatedMapping,
    RowParallelMapping,
)
from bridges.conversion.mapping import COLUMN, REPLICATED, ROW
from bridges.conversion.views import ViewError, bind, fuse, parse, slice_flat

# -- parse -------------------------------------------------------------------------------------------------------------


def test_parse_gives_dims_and_axes():
    """Factors of each dim on the left; shard, feature and rest on the right."""
    view = parse("(g n d) h -> g ; n d ; h")
    assert view.dims == (("g", "n", "d"), ("h",))
    assert (view.shard, view.feature, view.rest, view.index) == (("g",), ("n", "d"), ("h",), ())


def test_a_symbol_missing_on_the_right_is_an_index():
    """The expert number of a fused tensor."""
    assert parse("e (t f) h -> t ; f ; h").index == ("e",)


def test_only_the_segment_that_is_meant_counts():
    """Symbols of the other segments may repeat and are no index."""
    view = parse("(k [d | *d | r e | r e]) h -> k ; d ; h")
    assert view.dims[0][1].pick == 1
    assert view.index == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(g d) h", "write dims -> shard ; feature ; rest"),
        ("(g d) h -> g ; d", "write dims -> shard ; feature ; rest"),
        ("(g d) h -> g ; d ; h ; x", "write dims -> shard ; feature ; rest"),
        ("(g d) h -> g ; x ; h", "'x' stands on the right"),
        ("([*g | d]) h -> d ; ; h", "'d' stands on the right"),
        ("(g g) h -> g ; ; h", "a symbol is used twice"),
        ("(g d) h -> g ; d g ; h", "a symbol is used twice"),
        ("(g d h -> g ; d ; h", "a bracket is not closed"),
        ("([*g | d h -> g ; ; h", "a bracket is not closed"),
        ("([g | d]) h -> g ; ; h", "mark one of the segments with *"),
        ("([*g | ]) h -> g ; ; h", "mark one of the segments with *"),
        ("([*g | *d]) h -> g ; ; h", "unexpected '*'"),
        ("((g d)) h -> g ; d ; h", "unexpected '('"),
        ("([*(g d) | d]) h -> g ; d ; h", "unexpected '('"),
        ("(*g d) h -> g ; d ; h", "unexpected '*'"),
        ("g) h -> g ; ; h", "unexpected ')'"),
        ("[*g | d] h -> g ; ; h", "unexpected '['"),
        ("*g h -> g ; ; h", "unexpected '*'"),
        ("(g + d) h -> g ; d ; h", "cannot read ' + d) h'"),
        ("(2 d) h -> d ; ; h", "cannot read '2 d) h'"),
    ],
)
def test_parse_errors_name_what_is_wrong(text, message):
    """Each names the expression and the fault."""
    with pytest.raises(ViewError) as error:
        parse(text)
    assert text in str(error.value)
    assert message in str(error.value)


# -- bind --------------------------------------------------------------------------------------------------------------


def test_bind_gives_offset_sizes_and_strides():
    """q of a fused [q | k | v]: k starts behind all of q."""
    bound = bind(parse("([g n d | *g d | g d]) h -> g ; d ; h"), (128, 24), {"g": 2, "n": 2, "d": 16}, {})
    assert bound.offset == 64 * 24
    assert (bound.shard, bound.feature, bound.rest) == (((2, 16 * 24),), ((16, 24),), ((24, 1),))


@pytest.mark.parametrize(
    ("view", "shape", "known", "symbol", "size"),
    [
        ("(g n d) h -> g ; n d ; h", (96, 5), {"g": 2, "d": 16}, "n", 3),
        ("([*q d | g d | g d]) h -> q ; d ; h", (96, 5), {"g": 1, "d": 16}, "q", 4),
        ("(k [*d | d | r e | r e]) h -> k ; d ; h", (120, 5), {"d": 4, "r": 2, "e": 8}, "k", 3),
        ("(k [*d | d | r e | r e]) h -> k ; d ; h", (120, 5), {"k": 3, "d": 4, "r": 2}, "e", 8),
    ],
)
def test_one_unknown_factor_is_worked_out(view, shape, known, symbol, size):
    """From the extent of its dim, also inside segments."""
    assert dict(bind(parse(view), shape, known, {}).sizes)[symbol] == size


@pytest.mark.parametrize(
    ("view", "shape", "known", "message"),
    [
        (
            "(g n d) h -> g ; n d ; h",
            (95, 5),
            {"g": 2, "d": 16},
            "dim 0 has 95; `(g n d)` with g=2, d=16 needs a multiple of 32",
        ),
        ("(g n d) h -> g ; n d ; h", (95, 5), {"g": 2, "n": 3, "d": 16}, "`(g n d)` with g=2, n=3, d=16 needs 96"),
        (
            "o (t i) -> t ; o ; i",
            (7, 10),
            {"t": 4},
            "shape (7, 10): dim 1 has 10; `(t i)` with t=4 needs a multiple of 4",
        ),
        ("([*t f | t f]) h -> t ; f ; h", (10, 3), {"t": 2}, "`([*t f | t f])` with t=2 needs a multiple of 4"),
        ("(k [*d | d | r e | r e]) h -> k ; d ; h", (50, 5), {"d": 4, "r": 2, "e": 8}, "needs a multiple of 40"),
        ("(g n d) h -> g ; n d ; h", (96, 5), {"g": 2}, "the sizes of d, n cannot be told from shape (96, 5)"),
        ("(g d) h -> g ; d ; h", (8,), {"g": 2}, "shape (8,) has 1 dims; `(g d) h -> g ; d ; h` names 2"),
    ],
)
def test_bind_errors_name_the_dim_the_factors_and_the_multiple(view, shape, known, message):
    """What a wrong checkpoint shape is told."""
    with pytest.raises(ViewError) as error:
        bind(parse(view), shape, known, {})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "nothing says which 'e' is meant"),
        ({"e": 4}, "e=4 is outside the tensor's 4"),
        ({"e": -1}, "e=-1 is outside the tensor's 4"),
    ],
)
def test_an_index_outside_the_tensor_is_an_error(index, message):
    """An expert that a fused tensor does not hold."""
    with pytest.raises(ViewError) as error:
        bind(parse("e (t f) h -> t ; f ; h"), (4, 6, 3), {"t": 2}, index)
    assert message in str(error.value)


# -- axes --------------------------------------------------------------------------------------------------------------

axes = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=4)


def offsets(axes) -> list[tuple[int, int]]:
    """(offset on side a, offset on side b) of every element, in order."""
    out = [(0, 0)]
    for size, a, b in axes:
        out = [(x + i * a, y + i * b) for x, y in out for i in range(size)]
    return out


@given(axes)
def test_fuse_keeps_every_element_and_its_order(axes):
    """Joined and dropped axes walk the same pairs of offsets."""
    assert offsets(fuse(axes)) == offsets(axes)


@given(axes, st.data())
def test_slice_flat_is_an_interval_of_the_flattened_axes(axes, data):
    """Its blocks, one after the other, are the elements low to high, none more."""
    total = math.prod(size for size, _, _ in axes)
    low = data.draw(st.integers(0, total))
    high = data.draw(st.integers(low, total))
    blocks = [(p.a + a, p.b + b) for p in slice_flat(axes, low, high) for a, b in offsets(p.axes)]
    assert blocks == offsets(axes)[low:high]


# -- mappings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: AutoMapping("decoder.layers.*.mlp.linear_fc2.weight", "model.layers.*.*.down.weight"),
        lambda: AutoMapping("decoder.layers.*.mlp.linear_fc2.weight", "model.down.weight"),
        lambda: ReplicatedMapping("decoder.layers.*.norm.weight", "norm.weight"),
        lambda: RowParallelMapping("decoder.final.weight", "layers.*.weight"),
        lambda: QKVMapping("decoder.layers.*.linear_qkv.weight", q="l.*.q", k="l.*.k", v="l.*.*.v"),
        lambda: GatedMLPMapping("decoder.layers.*.experts.linear_fc1.weight*", gate="l.*.gate", up="l.*.up"),
        lambda: ParamMapping("layers.*.experts.weight*", (Part("l.*.e.*", "e o i -> o ; ; i"),)),
    ],
    ids=["two for one", "none", "replicated", "row", "only v", "no expert", "index and star"],
)
def test_another_number_of_wildcards_is_refused_at_construction(make):
    """Whichever part it is in; the message counts both sides."""
    with pytest.raises(MappingError, match=r"has \d wildcards, .* has \d"):
        make()


def test_wildcards_stand_for_the_same_number_in_turn():
    """The k-th * of the Megatron name is the k-th of each Hugging Face name."""
    registry = MegatronMappingRegistry(
        GatedMLPMapping(
            "decoder.layers.*.mlp.experts.linear_fc1.weight*", gate="l.*.experts.*.gate", up="l.*.experts.*.up"
        )
    )
    _, parts = registry.megatron_to_hf_lookup("decoder.layers.12.mlp.experts.linear_fc1.weight3")
    assert [p.hf for p in parts] == ["l.12.experts.3.gate", "l.12.experts.3.up"]
    assert all(p.index == () for p in parts)


def test_a_number_without_a_star_becomes_the_index_of_the_view():
    """One fused tensor for all experts of a layer."""
    registry = MegatronMappingRegistry(
        ParamMapping("decoder.layers.*.experts.weight*", (Part("l.*.fused", "e o i -> o ; ; i"),))
    )
    _, (part,) = registry.megatron_to_hf_lookup("decoder.layers.12.experts.weight3")
    assert (part.hf, part.index) == ("l.12.fused", (("e", 3),))


@pytest.mark.parametrize(
    ("name", "sharding", "padded"),
    [
        ("embedding.word_embeddings.weight", COLUMN, True),
        ("output_layer.weight", COLUMN, True),
        ("decoder.layers.*.self_attention.linear_qkv.bias", COLUMN, False),
        ("decoder.layers.*.self_attention.linear_proj.weight", ROW, False),
        ("decoder.layers.*.self_attention.linear_proj.bias", REPLICATED, False),
        ("decoder.layers.*.mlp.linear_fc1.weight", COLUMN, False),
        ("decoder.layers.*.mlp.experts.linear_fc1.weight*", COLUMN, False),
        ("decoder.layers.*.mlp.experts.linear_fc2.weight*", ROW, False),
        ("decoder.layers.*.mlp.router.weight", REPLICATED, False),
        ("decoder.layers.*.mlp.shared_experts.gate_weight", REPLICATED, False),
        ("decoder.layers.*.self_attention.linear_qkv.layer_norm_weight", REPLICATED, False),
        ("decoder.layers.*.self_attention.q_layernorm.weight", REPLICATED, False),
        ("decoder.layers.*.pre_mlp_layernorm.weight", REPLICATED, False),
        ("decoder.final_layernorm.weight", REPLICATED, False),
        ("decoder.layers.*.self_attention.core_attention.softmax_offset", COLUMN, False),
    ],
)
def test_auto_mapping_shards_as_megatron_does(name, sharding, padded):
    """By the ending of the module's name."""
    mapping = AutoMapping(name, name)
    assert (mapping.sharding, mapping.padded) == (sharding, padded)
    assert mapping.hf_param == name


def test_auto_mapping_refuses_a_module_it_does_not_know():
    """And says which mappings state the sharding themselves."""
    with pytest.raises(MappingError, match=r"strange\.weight: AutoMapping does not know .* ColumnParallelMapping"):
        AutoMapping("decoder.layers.*.strange.weight", "model.layers.*.strange.weight")


def test_a_mapping_needs_a_tensor():
    """No parts, no mapping."""
    with pytest.raises(MappingError, match="needs at least one"):
        ParamMapping("a.weight", ())


# -- registry ----------------------------------------------------------------------------------------------------------


def registry() -> MegatronMappingRegistry:
    return MegatronMappingRegistry(
        AutoMapping("embedding.word_embeddings.weight", "embed.weight"),
        QKVMapping("decoder.layers.*.self_attention.linear_qkv.weight", q="l.*.q", k="l.*.k", v="l.*.v"),
        AutoMapping("decoder.layers.*.mlp.linear_fc2.weight", "l.*.down"),
    )


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("decoder.layers.7.mlp.linear_fc2.bias", "decoder.layers.*.mlp.linear_fc2.weight"),
        ("decoder.layers.7.self_attention.linear_kqv.weight", "decoder.layers.*.self_attention.linear_qkv.weight"),
        ("embedding.word_embedding.weight", "embedding.word_embeddings.weight"),
    ],
)
def test_an_unknown_parameter_is_told_the_nearest_mapping(name, nearest):
    """The message names both, and where to add one."""
    with pytest.raises(MappingError) as error:
        registry().megatron_to_hf_lookup(name)
    assert f"no mapping for Megatron parameter {name}; the nearest is {nearest}" in str(error.value)
    assert "mapping_registry()" in str(error.value)


def test_an_empty_registry_says_so_without_a_suggestion():
    """Nothing is near."""
    with pytest.raises(MappingError, match=r"no mapping for Megatron parameter x\. Add it"):
        MegatronMappingRegistry().megatron_to_hf_lookup("x")


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.7.mlp.linear_fc2.weight.extra",
        "x.decoder.layers.7.mlp.linear_fc2.weight",
        "decoder.layers.7a.mlp.linear_fc2.weight",
        "decoder_layers.7.mlp.linear_fc2.weight",
        "decoder.layers..mlp.linear_fc2.weight",
    ],
)
def test_a_pattern_matches_whole_names_and_numbers_only(name):
    """No prefix, no suffix, and a dot is a dot."""
    with pytest.raises(MappingError):
        registry().megatron_to_hf_lookup(name)


def test_the_first_mapping_that_matches_wins():
    """Among patterns, in order; an exact name before any pattern."""
    first = AutoMapping("a.*.linear_fc2.weight", "one.*")
    both = MegatronMappingRegistry(
        first, AutoMapping("a.*.linear_fc2.weight", "two.*"), AutoMapping("a.3.linear_fc2.weight", "three")
    )
    assert both.megatron_to_hf_lookup("a.2.linear_fc2.weight")[0] is first
    assert both.megatron_to_hf_lookup("a.3.linear_fc2.weight")[1][0].hf == "three"


def test_a_renamed_copy_works_in_a_new_registry():
    """Plugins copy a mapping, rename it and build type(registry)(*mappings): both names are found, each as itself, and
    the first registry knows nothing of it."""
    original = registry()
    renamed = copy.copy(original.mappings[1])
    renamed.megatron_param = "decoder.layers.*.attn.linear_qkv.weight"
    new = type(original)(*original.mappings, renamed)
    assert len(new) == len(original) + 1
    for name in ("self_attention", "attn"):
        _, parts = new.megatron_to_hf_lookup(f"decoder.layers.5.{name}.linear_qkv.weight")
        assert [p.hf for p in parts] == ["l.5.q", "l.5.k", "l.5.v"]
    assert original.mappings[1].megatron_param == "decoder.layers.*.self_attention.linear_qkv.weight"
    with pytest.raises(MappingError):
        original.megatron_to_hf_lookup("decoder.layers.5.attn.linear_qkv.weight")


def test_a_renamed_copy_that_lost_a_wildcard_is_refused():
    """When the registry is built, not when a layer is missing."""
    renamed = copy.copy(registry().mappings[1])
    renamed.megatron_param = "decoder.layers.0.attn.linear_qkv.weight"
    with pytest.raises(MappingError, match="0 wildcards"):
        MegatronMappingRegistry(renamed)


def test_a_list_is_no_mapping():
    """MegatronMappingRegistry([...]) instead of (*[...])."""
    with pytest.raises(MappingError, match="one by one; got list"):
        MegatronMappingRegistry([ColumnParallelMapping("in_proj.weight", "x")])


def test_hf_param_is_the_name_or_the_names():
    """One tensor: its name; several: by position."""
    assert ColumnParallelMapping("in_proj.weight", "x").hf_param == "x"
    assert registry().mappings[1].hf_param == {"0": "l.*.q", "1": "l.*.k", "2": "l.*.v"}


def test_fused_and_separate_qkv_say_the_same_of_megatron():
    """The parts of both, bound to their own tensors, have the same axes."""
    sizes, torch_shape = {"g": 2, "n": 3, "d": 4}, torch.Size
    apart = QKVMapping("linear_qkv.weight", q="q", k="k", v="v")
    fused = ConcatenatedQKVMapping("linear_qkv.weight", "qkv")
    shapes = [torch_shape((24, 5)), torch_shape((8, 5)), torch_shape((8, 5))]
    for one, other, shape in zip(apart.parts, fused.parts, shapes, strict=True):
        a, b = bind(parse(one.view), shape, sizes, {}), bind(parse(other.view), (40, 5), sizes, {})
        assert [n for n, _ in (*a.shard, *a.feature, *a.rest)] == [n for n, _ in (*b.shard, *b.feature, *b.rest)]
        assert a.shard_size == b.shard_size == 2
