"""Layouts as values: their text, their errors, and that their functions say what Megatron's groups and models say."""

from __future__ import annotations

import contextlib
import itertools
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank

import toy_models
from bridges import AutoBridge, GPTModelProvider, Layout, LayoutError
from bridges.conversion.tasks import current_layout
from bridges.hf_pretrained import load_config
from bridges.layout import Coords
from bridges.providers.core_attention import zigzag_positions
from bridges.providers.groups import ensure_process_groups
from harness.layouts import DENSE_AXES, EXPERT_AXES, MAX_RANKS, choose, covering
from harness.mechanisms import provider_of
from harness.ranks import jobs
from tests.strategies import layouts

# -- text --------------------------------------------------------------------------------------------------------------


@given(layouts())
def test_a_layout_prints_as_what_it_parses_from(layout):
    """Parse and print are inverse, and the text is in the one order."""
    assert Layout.parse(str(layout)) == layout
    assert Layout.parse(layout) is layout
    order = ["tp", "pp", "vpp", "ep", "etp", "cp", "sp", "dp", "split"]
    words = [re.match("[a-z]+", word)[0] for word in str(layout).split("-")]
    assert words == [axis for axis in order if axis in words]


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("tp1", Layout()),
        ("tp2-pp2-vpp2-ep2-etp1-cp2-sp", Layout(tp=2, pp=2, vpp=2, ep=2, etp=1, cp=2, sp=True)),
        ("tp4-ep2-etp2", Layout(tp=4, ep=2, etp=2)),
        ("pp2-split3.5", Layout(pp=2, split=(3, 5))),
        ("pp3-split4.4.0", Layout(pp=3, split=(4, 4, 0))),
        ("dp2", Layout(dp=2)),
    ],
)
def test_examples_of_the_text(text, layout):
    """What the documentation writes, both ways."""
    assert Layout.parse(text) == layout
    assert str(layout) == text


@given(st.permutations(["tp2", "pp2", "ep2", "etp1", "cp2", "sp", "vpp3"]))
def test_the_order_of_words_does_not_matter(words):
    """Any order parses to the same layout."""
    assert Layout.parse("-".join(words)) == Layout.parse("tp2-pp2-vpp3-ep2-etp1-cp2-sp")


def test_etp_is_tp_unless_said():
    """Megatron's default, and the smallest data-parallel size that makes room for the experts."""
    assert Layout(tp=4).expert_tp == 4
    assert Layout(tp=4, ep=2).dp == 2
    assert Layout(tp=2, ep=2, etp=1).dp == 1
    assert Layout(tp=2, ep=3, etp=1).world_size == 6


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Layout.parse("tp2-foo3"), "cannot read 'foo3'"),
        (lambda: Layout.parse("tp"), "cannot read 'tp'"),
        (lambda: Layout.parse("sp2-tp2"), "cannot read 'sp2'"),
        (lambda: Layout.parse("tp2_pp2"), "cannot read 'tp2_pp2'"),
        (lambda: Layout.parse(""), "cannot read ''"),
        (lambda: Layout.parse("tp2--pp2"), "cannot read ''"),
        (lambda: Layout.parse("tp-2"), "cannot read 'tp'"),
        (lambda: Layout.parse("pp2-split3,5"), "cannot read 'split3,5'"),
        (lambda: Layout.parse("tp2-tp4"), "tp is given twice"),
        (lambda: Layout.parse("tp2-sp-sp"), "sp is given twice"),
        (lambda: Layout(tp=0), "tp=0: a parallel size is at least 1"),
        (lambda: Layout.parse("ep0"), "ep=0: a parallel size is at least 1"),
        (lambda: Layout(vpp=2), "vpp=2 needs pp > 1"),
        (lambda: Layout(sp=True), "sp needs tp > 1"),
        (lambda: Layout(pp=2, split=(8,)), "split (8,) has 1 chunks; pp2 x vpp1 needs 2"),
        (lambda: Layout(pp=2, vpp=2, split=(3, 5)), "split (3, 5) has 2 chunks; pp2 x vpp2 needs 4"),
        (
            lambda: Layout(tp=2, dp=3, ep=4, etp=1),
            "tp2 x cp1 x dp3 = 6 ranks a stage cannot be divided by etp1 x ep4 = 4",
        ),
        (lambda: Layout(tp=2).coords(2), "rank 2 is not in layout tp2 of 2 ranks"),
        (lambda: Layout(tp=2).coords(-1), "rank -1 is not in layout tp2 of 2 ranks"),
        (lambda: Layout(pp=4, vpp=3).chunk_layers(8), "8 layers cannot fill pp4 x vpp3 = 12 model chunks"),
        (lambda: Layout(pp=2, split=(3, 5)).chunk_layers(9), "split 3.5 holds 8 layers; the model has 9"),
        (lambda: Layout(ep=4).experts(0, 6), "6 experts cannot be divided by ep=4"),
    ],
)
def test_errors_name_the_numbers(make, message):
    """Which number, by which number."""
    with pytest.raises(LayoutError) as error:
        make()
    assert message in str(error.value)


SIZES = {"num_layers": 8, "num_heads": 4, "num_query_groups": 2, "ffn": 96}
EXPERTS = {"num_experts": 8, "moe_ffn": 40, "shared_ffn": 48}


@pytest.mark.parametrize(
    ("text", "sizes", "message"),
    [
        ("tp3", {}, "4 attention heads cannot be divided by tp=3"),
        ("tp6", {"num_heads": 12, "num_query_groups": 4}, "4 query groups and tp=6: one must divide the other"),
        ("tp4", {"ffn": 90}, "feed-forward width 90 cannot be divided by tp=4"),
        ("pp4-vpp4", {}, "8 layers cannot fill pp4 x vpp4 = 16 model chunks"),
        ("ep2", {}, "layout ep2 asks for expert parallelism; the model has no experts"),
        ("tp2-etp1", {}, "layout tp2-etp1 asks for expert parallelism; the model has no experts"),
        ("ep3", EXPERTS, "8 experts cannot be divided by ep=3"),
        ("tp4", {**EXPERTS, "moe_ffn": 42}, "expert width 42 cannot be divided by etp=4"),
        ("tp4", {**EXPERTS, "shared_ffn": 42}, "shared-expert width 42 cannot be divided by tp=4"),
    ],
)
def test_a_model_that_does_not_divide_is_told_by_which_number(text, sizes, message):
    """check() before anything is built."""
    with pytest.raises(LayoutError) as error:
        Layout.parse(text).check(**{**SIZES, **sizes})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("tp4", {}),
        ("tp2-pp4-vpp2-sp", {}),
        ("ep8", EXPERTS),
        ("tp4-ep2-etp2", EXPERTS),
        ("tp2-etp1", EXPERTS),
        ("pp2-split3.5", {}),
    ],
)
def test_a_model_that_divides_is_not_refused(text, sizes):
    """tp4 over two query groups among them."""
    Layout.parse(text).check(**{**SIZES, **sizes})


# -- pure functions ------------------------------------------------------------------------------------------------------


@given(layouts(), st.integers(1, 60))
def test_every_layer_is_in_one_chunk(layout, layers):
    """In order, none left out, none twice; without a split no chunk holds two more than another."""
    if layout.split is not None:
        layers = sum(layout.split)
    if layout.split is None and layers < layout.num_chunks:
        with pytest.raises(LayoutError):
            layout.chunk_layers(layers)
        return
    chunks = layout.chunk_layers(layers)
    assert [layer for chunk in chunks for layer in chunk] == list(range(layers))
    assert len(chunks) == layout.num_chunks
    if layout.split is None:
        assert max(map(len, chunks)) - min(map(len, chunks)) <= 1
    else:
        assert tuple(map(len, chunks)) == layout.split


@given(layouts())
def test_coordinates_are_all_different_and_within_their_axes(layout):
    """Both ways to count the ranks, (tp, cp, dp, pp) and (etp, ep, edp, pp), give every rank its own place."""
    found = [layout.coords(rank) for rank in range(layout.world_size)]
    assert len({(c.tp, c.cp, c.dp, c.pp) for c in found}) == layout.world_size
    assert len({(c.etp, c.ep, c.edp, c.pp) for c in found}) == layout.world_size
    for axis, size in (
        ("tp", layout.tp),
        ("cp", layout.cp),
        ("dp", layout.dp),
        ("pp", layout.pp),
        ("etp", layout.expert_tp),
        ("ep", layout.ep),
    ):
        assert {getattr(c, axis) for c in found} == set(range(size))


# -- Megatron's groups and models ----------------------------------------------------------------------------------------


def megatron_coords(layout: Layout) -> tuple[Coords, bool]:
    """On a rank: its place in every group that Megatron made, and whether bridges reads the same layout from them."""
    jobs.use_layout(layout)
    provider = GPTModelProvider(num_layers=8, hidden_size=64, num_attention_heads=4).apply_layout(layout)
    ensure_process_groups(provider, layout)
    p = parallel_state
    coords = Coords(
        tp=p.get_tensor_model_parallel_group().rank(),
        cp=p.get_context_parallel_group().rank(),
        dp=p.get_data_parallel_group().rank(),
        pp=p.get_pipeline_model_parallel_group().rank(),
        etp=p.get_expert_tensor_parallel_group().rank(),
        ep=p.get_expert_model_parallel_group().rank(),
        edp=p.get_expert_data_parallel_group().rank(),
    )
    return coords, current_layout(provider) == (layout, coords)


@pytest.mark.parametrize(
    "text",
    [
        "tp2-sp",
        "pp2-vpp2",
        "cp2",
        "ep2",
        "dp2",
        "tp2-etp1",
        "tp2-pp2-split3.5",
        "tp2-cp2",
        "tp2-ep2",
        "tp2-ep2-etp1-dp2",
        "tp4-ep2-etp2",
        "cp2-ep2-etp1-dp2",
        "pp2-ep2",
        "tp2-pp2-vpp2-ep2-etp1-cp2-sp",
        "tp2-ep2-cp2-dp2",
        "tp2-pp2-ep2",
        "tp2-ep4-etp1-cp2-dp2",
        "pp4-vpp2-dp2",
    ],
)
def test_coords_are_those_of_megatrons_groups(text, ranks):
    """tp, cp, dp, pp, etp, ep and edp of every rank, against process groups that Megatron made."""
    layout = Layout.parse(text)
    ranks.use_for(layout)
    found = ranks.run(layout.world_size, megatron_coords, layout)
    assert [coords for coords, _ in found] == [layout.coords(rank) for rank in range(layout.world_size)]
    assert all(same for _, same in found)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A dense checkpoint and one with experts, eight layers each."""
    root = tmp_path_factory.mktemp("layouts")
    return {row: toy_models.write(row, root / row) for row in ("llama3", "qwen3_moe")}


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("llama3", "pp2-split3.5"),
        ("llama3", "pp2-vpp2"),
        ("llama3", "pp2-vpp2-split1.2.3.2"),
        ("qwen3_moe", "tp2-ep2-etp1"),
        ("qwen3_moe", "pp2-ep2-split5.3"),
    ],
)
def test_layers_and_experts_are_where_megatron_builds_them(row, text, folders, ranks):
    """chunk_layers and experts against the global names in the model that Megatron built on every rank."""
    layout = Layout.parse(text)
    count = 8 if bool(provider_of(row).num_moe_experts) else 0
    ranks.use_for(layout)
    built = ranks.run(layout.world_size, jobs.build, str(folders[row]), layout)
    chunks = layout.chunk_layers(8)
    for rank, found in enumerate(built):
        at = layout.coords(rank)
        names = [name for name, _, _ in found.parameters]
        layers = {int(name.split(".")[2]) for name in names if name.startswith("decoder.layers.")}
        assert layers == {layer for c in range(at.pp, len(chunks), layout.pp) for layer in chunks[c]}
        experts = {(int(name.split(".")[2]), int(re.search(r"\d+$", name)[0])) for name in names if ".experts." in name}
        assert experts == {(layer, e) for layer in layers for e in (layout.experts(at.ep, count) if count else ())}


def megatrons_positions(layout: Layout, length: int) -> list[int]:
    """On a rank: the positions of its tokens, as Megatron cuts its rotary embedding."""
    jobs.use_layout(layout)
    ensure_process_groups(
        GPTModelProvider(num_layers=8, hidden_size=64, num_attention_heads=4).apply_layout(layout), layout
    )
    positions = torch.arange(length).view(length, 1, 1, 1)
    return get_pos_emb_on_this_cp_rank(positions, 0, parallel_state.get_context_parallel_group()).flatten().tolist()


@pytest.mark.parametrize("cp", [2, 4])
def test_zigzag_positions_are_megatrons(cp, ranks):
    """Rank r holds pieces r and 2 cp - 1 - r of the sequence; all ranks together hold all of it."""
    ranks.use_for(Layout(cp=cp))
    found = ranks.run(cp, megatrons_positions, Layout(cp=cp), 24)
    assert found == [zigzag_positions(24 // cp, rank, cp).tolist() for rank in range(cp)]
    assert sorted(itertools.chain(*found)) == list(range(24))


def test_zigzag_positions_of_one_rank_and_of_an_odd_number():
    """One rank holds all, in order; an odd number of tokens a rank cannot be cut in two."""
    assert zigzag_positions(7, 0, 1).tolist() == list(range(7))
    with pytest.raises(ValueError, match="3 tokens a rank"):
        zigzag_positions(3, 0, 2)


# -- sweeps --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [False, True])
def test_quick_has_at_least_six_layouts(experts):
    """All different; one rank, TP, PP and CP are in, experts where there are some."""
    quick = choose("quick", experts=experts)
    assert len(set(quick)) == len(quick) >= 6
    assert Layout() in quick
    for axis in ("tp", "pp", "vpp", "cp") + (("ep",) if experts else ()):
        assert max(getattr(layout, axis) for layout in quick) > 1


@pytest.mark.parametrize("row", toy_models.rows())
def test_every_row_fits_into_at_least_six_quick_layouts(row):
    """A skip says nothing: at least six of the layouts divide the row's model."""
    fit = 0
    for layout in choose("quick", experts=bool(provider_of(row).num_moe_experts)):
        with contextlib.suppress(LayoutError):
            config = load_config(toy_models.config_dict(row), Path(row), trusted=False)
            provider = AutoBridge.from_hf_config(config).to_megatron_provider()
            provider.apply_layout(layout).check_layout()
            fit += 1
    assert fit >= 6


def axis_values(layout: Layout) -> dict[str, int | bool]:
    return {
        axis: layout.expert_tp if axis == "etp" else getattr(layout, axis)
        for axis in ("tp", "pp", "vpp", "cp", "sp", "ep", "etp")
    }


@pytest.mark.parametrize("experts", [False, True])
def test_full_covers_every_pair_of_axis_values_that_fits(experts):
    """By brute force: each pair of values of the issue's axes that occurs in any layout of eight ranks occurs in a
    chosen one."""
    values = {"tp": (1, 2, 4), "pp": (1, 2, 4), "vpp": (1, 2), "cp": (1, 2), "sp": (False, True)}
    values |= {"ep": (1, 2, 4), "etp": (1, 2)} if experts else {}
    assert values == (EXPERT_AXES if experts else DENSE_AXES)
    assert MAX_RANKS == 8
    possible = []
    for numbers in itertools.product(*values.values()):
        try:
            layout = Layout(**dict(zip(values, numbers, strict=True)))
        except LayoutError:
            continue
        if layout.world_size <= 8:
            possible.append(axis_values(layout))
    chosen = choose("full", experts=experts)
    assert all(layout.world_size <= 8 for layout in chosen)
    covered = [axis_values(layout) for layout in chosen]
    pairs = 0
    for one, other in itertools.combinations(values, 2):
        wanted = {(p[one], p[other]) for p in possible}
        assert wanted <= {(c[one], c[other]) for c in covered}, (one, other)
        pairs += len(wanted)
    assert pairs > 30
    assert len(chosen) <= 13  # every layout is run for every row
    covering.cache_clear()
    assert choose("full", experts=experts) == chosen


@pytest.mark.parametrize("experts", [False, True])
def test_full_has_the_known_nasty_layouts(experts):
    """TP above the toy rows' two query groups, an uneven split, many virtual stages, everything for experts at once."""
    chosen = choose("full", experts=experts)
    assert any(layout.tp > 2 for layout in chosen)
    assert any(layout.split and len(set(layout.split)) > 1 for layout in chosen)
    assert any((layout.pp, layout.vpp) == (4, 2) for layout in chosen)
    assert any((layout.tp, layout.pp) == (2, 2) for layout in chosen)
    assert any((layout.tp, layout.pp, layout.ep) == (2, 2, 2) for layout in chosen) == experts
    assert any(layout.ep > 1 for layout in chosen) == experts


def test_full_of_a_dense_model_asks_for_no_experts():
    """No layout that a dense row could only skip."""
    for layout in choose("full", experts=False):
        layout.check(num_layers=8, num_heads=4, num_query_groups=2, ffn=96)


def test_layouts_by_name_and_together():
    """Names are parsed, sets joined, repeats dropped."""
    assert choose("tp2", experts=False) == [Layout(tp=2)]
    assert choose(["tp2", "quick", "tp2"], experts=False) == [Layout(tp=2), *choose("quick", experts=False)]
    with pytest.raises(LayoutError, match="cannot read 'nonsense'"):
        choose("nonsense", experts=False)
