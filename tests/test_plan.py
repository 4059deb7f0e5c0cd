"""The copy engine: export(import(x)) == x for any mapping and layout, against torch's own cat and chunk, and the proof."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from bridges import GatedMLPMapping, Layout, MegatronMappingRegistry, PlanError, QKVMapping
from bridges.conversion.mapping import REPLICATED
from bridges.conversion.plan import Copy, Shard, copies, shard_of
from bridges.conversion.proof import Coverage, Held, Parameter, count_tensors, fault_of, local_shape, prove_ranks
from bridges.conversion.tasks import ConversionTask
from bridges.conversion.transfer import box_view, export_weights, import_weights
from bridges.conversion.views import Box
from bridges.families.llama import LlamaBridge
from bridges.families.qwen3 import Qwen3MoeBridge
from bridges.layout import Coords
from tests import simulated
from tests.strategies import CONVERSIONS, Conversion, conversions

# -- a conversion on real tensors --------------------------------------------------------------------------------------


def hf_tensors(case: Conversion) -> dict[str, torch.Tensor]:
    """float64 tensors in which no two elements are alike."""
    start, tensors = 1, {}
    for name, shape in case.hf_shapes.items():
        count = math.prod(shape)
        tensors[name] = torch.arange(start, start + count, dtype=torch.float64).view(shape)
        start += count
    return tensors


def plans(case: Conversion, tp: int) -> dict[tuple[str, int], tuple[tuple[int, ...], list[Copy]]]:
    """{(Megatron name, rank): (local shape, copies)} of every distinct shard."""
    registry = MegatronMappingRegistry(case.mapping)
    found = {}
    for name in case.names:
        mapping, parts = registry.megatron_to_hf_lookup(name)
        size = 1 if mapping.sharding == REPLICATED else tp
        shape = local_shape(mapping, case.shape, size)
        for rank in range(size):
            plan = copies(name, mapping, parts, case.hf_shapes, case.sizes, Shard(rank, size), shape)
            found[name, rank] = shape, plan
    return found


def imported(case: Conversion, tp: int, source: dict[str, torch.Tensor]) -> dict[tuple[str, int], torch.Tensor]:
    """Every shard, imported by the product from the Hugging Face tensors over a poison of NaN."""
    tasks = tasks_of(case, tp)
    import_weights(tasks.values(), simulated.Source(source))
    return {key: task.tensor for key, task in tasks.items()}


def tasks_of(case: Conversion, tp: int) -> dict[tuple[str, int], ConversionTask]:
    mapping = case.mapping
    return {
        (name, rank): ConversionTask(name, mapping, simulated.poison(shape, torch.float64), plan)
        for (name, rank), (shape, plan) in plans(case, tp).items()
    }


def exported(case: Conversion, tp: int, shards: dict[tuple[str, int], torch.Tensor]) -> dict[str, torch.Tensor]:
    """The Hugging Face tensors, exported by the product from every shard over a poison of NaN."""
    target = {n: torch.full(s, math.nan, dtype=torch.float64) for n, s in case.hf_shapes.items()}
    for (name, rank), task in tasks_of(case, tp).items():
        task.tensor.copy_(shards[name, rank])
        coords = Coords(tp=rank, cp=0, dp=0, pp=0, etp=rank, ep=0, edp=0)
        export_weights([task], coords, target.__getitem__)
    return target


def elements(box: Box, numel: int) -> list[int]:
    """The flat indices that a box of a tensor of `numel` elements stands for."""
    return box_view(torch.arange(numel), box).flatten().tolist()


def prove(hf_shapes, plans, repeated=None) -> Coverage:
    """The proof for (parameter, local shape, copies, padded) of each distinct shard, made or broken by a test."""
    coverage, read = Coverage(), {}
    for name, shape, plan, padded in plans:
        coverage.megatron_parameters += 1
        coverage.megatron_elements += math.prod(shape)
        if fault := fault_of(math.prod(shape), tuple(c.megatron_box for c in plan), padded):
            coverage.errors.append(f"Megatron {name} {shape}: {fault}")
        for copy in plan:
            read.setdefault(copy.hf, []).append(copy.hf_box)
    count_tensors(coverage, hf_shapes, read, repeated)
    return coverage


# -- the oracle: how Megatron itself lays parameters out -----------------------------------------------------------------


def oracle(case: Conversion, tp: int, hf: dict[str, torch.Tensor]) -> dict[tuple[str, int], torch.Tensor]:
    """The shards, put together with torch.cat and torch.chunk alone; vocabulary padding is zero."""
    dims, tensors = case.dims, list(hf.values())
    out = {}
    for i, name in enumerate(case.names):
        if case.kind == "qkv":
            g, n, d = dims["g"], dims["n"], dims["d"]
            q, k, v = tensors if len(tensors) == 3 else tensors[0].split([g * n * d, g * d, g * d])
            groups = [x.reshape(g, -1, *x.shape[1:]) for x in (q, k, v)]
            shards = torch.cat(groups, dim=1).flatten(0, 1).chunk(tp)
        elif case.kind in ("gated", "experts rows", "experts columns", "experts interleaved", "experts apart"):
            if case.kind == "experts apart":
                gate, up = (hf[f"layers.1.experts.{i}.{p}"] for p in ("gate", "up"))
            elif case.kind == "experts interleaved":
                gate, up = tensors[0][i, 0::2], tensors[0][i, 1::2]
            elif case.kind == "experts columns":
                gate, up = tensors[0][i].T.chunk(2)
            elif case.kind == "experts rows":
                gate, up = tensors[0][i].chunk(2)
            else:
                gate, up = tensors if len(tensors) == 2 else tensors[0].chunk(2)
            shards = [torch.cat(pair) for pair in zip(gate.chunk(tp), up.chunk(tp), strict=True)]
        elif case.kind == "packed":
            r, d, re = dims["n"], dims["d"], dims["n"] * dims["e"]
            heads = dims["t"] * dims["g"]
            qkvz = hf["qkvz"].view(heads, -1, dims["h"]).split([d, d, re, re], dim=1)
            ba = hf["ba"].view(heads, -1, dims["h"]).split([r, r], dim=1)
            per_rank = [[x.flatten(0, 1) for x in piece.chunk(tp)] for piece in (*qkvz, *ba)]
            shards = [torch.cat(pieces) for pieces in zip(*per_rank, strict=True)]
        elif case.kind in ("row", "experts down"):
            whole = tensors[0] if case.kind == "row" else tensors[0][i]
            shards = whole.chunk(tp, dim=1)
        elif case.kind == "vocabulary":
            rows = -(-case.shape[0] // tp) * tp
            padding = torch.zeros((rows - len(tensors[0]), dims["h"]), dtype=torch.float64)
            shards = torch.cat([tensors[0], padding]).chunk(tp)
        else:
            shards = tensors[0].chunk(tp) if case.kind == "column" else tensors
        out |= {(name, rank): shard for rank, shard in enumerate(shards)}
    return out


def qkv_case(groups: int) -> Conversion:
    """Four heads of four channels a group: 24 rows for each."""
    mapping = QKVMapping("self_attention.linear_qkv.weight", q="q", k="k", v="v")
    shapes = {"q": (groups * 16, 3), "k": (groups * 4, 3), "v": (groups * 4, 3)}
    return Conversion(
        "qkv",
        mapping,
        ("self_attention.linear_qkv.weight",),
        shapes,
        (groups * 24, 3),
        {"g": groups, "n": 4, "d": 4},
        {"g": groups, "n": 4, "d": 4},
        (1, 2, 4, 8),
    )


@pytest.mark.parametrize("kind", CONVERSIONS)
@given(data=st.data())
def test_import_lays_parameters_out_as_megatron_does(kind, data):
    """Every shard equals what torch.cat and torch.chunk make, for any tensor-parallel size that divides: also above the
    number of query groups, where ranks hold even cuts of the fused rows. What no copy writes is vocabulary padding, and zero."""
    case = data.draw(conversions(kind))
    tp = data.draw(st.sampled_from(case.tps))
    hf = hf_tensors(case)
    shards, expected = imported(case, tp, hf), oracle(case, tp, hf)
    assert set(shards) == set(expected)
    for key, shard in shards.items():
        assert shard.shape == expected[key].shape
        assert torch.equal(shard, expected[key]), key


@pytest.mark.parametrize("kind", CONVERSIONS)
@given(data=st.data())
def test_invert(kind, data):
    """export(import(x)) == x bit for bit in any layout, and the same from every layout. Each Hugging Face element is
    read once, each Megatron element written once (padding never), counted one by one; the proof counts the same."""
    case = data.draw(conversions(kind))
    hf = hf_tensors(case)
    for tp in data.draw(st.lists(st.sampled_from(case.tps), min_size=1, max_size=2, unique=True)):
        out = exported(case, tp, imported(case, tp, hf))
        assert all(torch.equal(out[name], tensor) for name, tensor in hf.items())

        read = Counter()
        for shape, plan in plans(case, tp).values():
            written = Counter()
            for copy in plan:
                assert copy.hf_box.sizes == copy.megatron_box.sizes
                read.update((copy.hf, i) for i in elements(copy.hf_box, hf[copy.hf].numel()))
                written.update(elements(copy.megatron_box, math.prod(shape)))
            assert set(written.values()) <= {1}
            assert case.mapping.padded or len(written) == math.prod(shape)
        assert read == Counter((name, i) for name, tensor in hf.items() for i in range(tensor.numel()))

        coverage = prove(
            case.hf_shapes,
            [(name, shape, plan, case.mapping.padded) for (name, _), (shape, plan) in plans(case, tp).items()],
        )
        assert coverage.ok, coverage.errors
        assert coverage.hf_elements == len(read)
        assert coverage.megatron_elements == sum(math.prod(shape) for shape, _ in plans(case, tp).values())


@pytest.mark.parametrize("kind", [k for k in CONVERSIONS if k != "vocabulary"])
@given(data=st.data())
def test_a_size_that_does_not_divide_is_refused(kind, data):
    """Any tensor-parallel size but the divisors is an error that names the parameter, not a wrong cut."""
    case = data.draw(conversions(kind))
    assume(case.kind != "replicated")
    tp = data.draw(st.integers(2, 17).filter(lambda tp: tp not in case.tps))
    with pytest.raises(PlanError, match=r"linear_|in_proj"):
        plans(case, tp)


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_above_the_query_groups_ranks_hold_even_cuts_of_the_fused_rows(groups, tp):
    """The fused rows at any TP, one shard after the other, are those at TP1, and go back from there."""
    case = qkv_case(groups)
    hf = hf_tensors(case)
    one, many = imported(case, 1, hf), imported(case, tp, hf)
    assert len(many) == tp
    assert torch.equal(torch.cat(list(many.values())), *one.values())
    assert all(torch.equal(tensor, hf[name]) for name, tensor in exported(case, tp, many).items())


@pytest.mark.parametrize("tp", [2, 8])
def test_a_gated_weight_is_cut_before_it_is_joined(tp):
    """At TP the shards are not cuts of the fused rows at TP1: each holds its rows of gate, then its rows of up."""
    mapping = GatedMLPMapping("mlp.linear_fc1.weight", gate="gate", up="up")
    case = Conversion(
        "gated", mapping, ("mlp.linear_fc1.weight",), {"gate": (16, 3), "up": (16, 3)}, (32, 3), {}, {}, ()
    )
    hf = hf_tensors(case)
    many = imported(case, tp, hf)
    assert not torch.equal(torch.cat(list(many.values())), *imported(case, 1, hf).values())
    for rank in range(tp):
        assert torch.equal(
            many["mlp.linear_fc1.weight", rank], torch.cat([hf["gate"].chunk(tp)[rank], hf["up"].chunk(tp)[rank]])
        )


# -- errors of a plan --------------------------------------------------------------------------------------------------

QKV = QKVMapping(
    "decoder.layers.*.self_attention.linear_qkv.weight",
    q="model.layers.*.self_attn.q_proj.weight",
    k="model.layers.*.self_attn.k_proj.weight",
    v="model.layers.*.self_attn.v_proj.weight",
)
QKV_NAME = "decoder.layers.3.self_attention.linear_qkv.weight"
QKV_SHAPES = {f"model.layers.3.self_attn.{p}_proj.weight": (rows, 24) for p, rows in (("q", 64), ("k", 32), ("v", 32))}


def qkv_copies(shapes=QKV_SHAPES, shape=(128, 24), rank=0, size=1) -> list[Copy]:
    mapping, parts = MegatronMappingRegistry(QKV).megatron_to_hf_lookup(QKV_NAME)
    return copies(QKV_NAME, mapping, parts, shapes, {"g": 2, "n": 2, "d": 16}, Shard(rank, size), shape)


def test_a_missing_tensor_is_named_with_the_nearest_that_is_there():
    """A typo in a mapping or a checkpoint of another family."""
    shapes = {name.replace("k_proj", "key_proj"): shape for name, shape in QKV_SHAPES.items()}
    with pytest.raises(PlanError) as error:
        qkv_copies(shapes)
    assert "model.layers.3.self_attn.k_proj.weight is missing" in str(error.value)
    assert QKV_NAME in str(error.value)
    assert "the checkpoint has model.layers.3.self_attn.key_proj.weight" in str(error.value)


def test_a_wrong_shape_is_told_with_the_expected_factors():
    """Both names, the dim and what it should be a multiple of."""
    with pytest.raises(PlanError) as error:
        qkv_copies({**QKV_SHAPES, "model.layers.3.self_attn.q_proj.weight": (65, 24)})
    message = str(error.value)
    assert "model.layers.3.self_attn.q_proj.weight" in message
    assert QKV_NAME in message
    assert "dim 0 has 65; `(g n d)` with g=2, n=2, d=16 needs 64" in message


def test_parts_that_do_not_fit_each_other_are_refused():
    """k with another hidden size than q."""
    with pytest.raises(PlanError, match="do not fit each other"):
        qkv_copies({**QKV_SHAPES, "model.layers.3.self_attn.k_proj.weight": (32, 23)})


def test_a_megatron_parameter_of_another_shape_is_refused():
    """The rows that the ranks should hold are in the message."""
    with pytest.raises(PlanError, match=r"128 rows over 2 ranks make 64 x \(24,\) each; Megatron holds \(32, 24\)"):
        qkv_copies(shape=(32, 24), size=2)


# -- the proof catches every wrong plan ----------------------------------------------------------------------------------


def proof(plan, shapes=QKV_SHAPES, repeated=None):
    return prove(shapes, [(QKV_NAME, (128, 24), plan, False)], repeated)


def test_the_right_plan_passes():
    """What the tests below break is good."""
    coverage = proof(qkv_copies())
    assert coverage.ok
    assert (coverage.hf_tensors, coverage.hf_elements, coverage.megatron_elements) == (3, 128 * 24, 128 * 24)


@pytest.mark.parametrize("index", range(3))
def test_a_missing_copy_is_found(index):
    """On the Megatron side as a gap, on the other as a tensor that nobody reads."""
    plan = qkv_copies()
    assert len(plan) == 3
    gone = plan.pop(index)
    errors = proof(plan).errors
    assert any(QKV_NAME in e and f"{gone.hf_box.numel} elements covered by nothing" in e for e in errors), errors
    assert any(gone.hf in e and "no Megatron parameter reads it" in e for e in errors), errors


@pytest.mark.parametrize("index", range(3))
def test_a_double_copy_is_found(index):
    """Both sides say how many elements are covered more than once."""
    plan = qkv_copies()
    errors = proof([*plan, plan[index]]).errors
    twice = f"{plan[index].hf_box.numel} more than once"
    assert sum(twice in e for e in errors) == 2, errors


@pytest.mark.parametrize("side", ["hf_box", "megatron_box"])
@pytest.mark.parametrize("offset", [1, 24, 10_000, -24, -10_000])
def test_a_box_out_of_range_or_in_the_wrong_place_is_found(side, offset):
    """A copy shifted by an element, a row, beyond the end or before the beginning."""
    plan = qkv_copies()
    box = getattr(plan[1], side)
    plan[1] = dataclasses.replace(plan[1], **{side: dataclasses.replace(box, offset=box.offset + offset)})
    assert proof(plan).errors


def test_a_tensor_that_nobody_reads_is_found():
    """It is named; a tensor that repeats another goes where that one goes."""
    q = next(iter(QKV_SHAPES))
    shapes = {**QKV_SHAPES, "model.again": QKV_SHAPES[q]}
    assert proof(qkv_copies(), shapes).errors == ["model.again: no Megatron parameter reads it"]
    assert proof(qkv_copies(), shapes, {"model.again": q}).ok
    assert not proof(qkv_copies(), shapes, {"model.again": "model.nothing"}).ok


def test_swapped_rows_within_a_tensor_are_no_gap():
    """The proof counts, it does not know what belongs where: that is for the oracle and for the logits."""
    plan = qkv_copies()
    k, v = plan[1], plan[2]
    plan[1:] = [
        dataclasses.replace(k, megatron_box=v.megatron_box),
        dataclasses.replace(v, megatron_box=k.megatron_box),
    ]
    assert proof(plan).ok


def test_nothing_counted_is_no_proof():
    """No tensors and no parameters: not ok."""
    assert not prove({}, []).ok


@given(st.integers(1, 40), st.sampled_from([1, 4, 16, 64]), st.sampled_from([1, 2, 4, 8]))
def test_ranks_that_hold_nothing_but_padding_are_fine(vocab, multiple, tp):
    """A small vocabulary padded far: the last ranks have no row of it, and the proof still holds."""
    case = Conversion(
        "vocabulary",
        next(m for m in LlamaBridge().mapping_registry() if m.padded),
        ("embedding.word_embeddings.weight",),
        {"model.embed_tokens.weight": (vocab, 2)},
        (-(-vocab // (multiple * tp)) * multiple * tp, 2),
        {},
        {"h": 2},
        (tp,),
    )
    shards = plans(case, tp)
    coverage = prove(case.hf_shapes, [(n, shape, plan, True) for (n, _), (shape, plan) in shards.items()])
    assert coverage.ok, coverage.errors
    assert coverage.hf_elements == vocab * 2


# -- far larger than the machine -----------------------------------------------------------------------------------------

# Published configs: meta-llama/Llama-3.1-405B and Qwen/Qwen3-235B-A22B.
LLAMA_405B = SimpleNamespace(
    num_layers=126,
    hidden=16384,
    heads=128,
    num_query_groups=8,
    kv_channels=128,
    ffn=53248,
    vocab_size=128256,
    heads_per_group=16,
    experts=0,
    qk_norm=False,
)
QWEN3_235B = SimpleNamespace(
    num_layers=94,
    hidden=4096,
    heads=64,
    num_query_groups=4,
    kv_channels=128,
    ffn=1536,
    vocab_size=151936,
    heads_per_group=16,
    experts=128,
    qk_norm=True,
)


def hf_shapes_of(c) -> dict[str, tuple[int, ...]]:
    """Every tensor of the published checkpoint, by formula."""
    q, kv = c.heads * c.kv_channels, c.num_query_groups * c.kv_channels
    shapes = {
        "model.embed_tokens.weight": (c.vocab_size, c.hidden),
        "model.norm.weight": (c.hidden,),
        "lm_head.weight": (c.vocab_size, c.hidden),
    }
    for layer in range(c.num_layers):
        p = f"model.layers.{layer}."
        shapes |= {
            p + "input_layernorm.weight": (c.hidden,),
            p + "post_attention_layernorm.weight": (c.hidden,),
            p + "self_attn.q_proj.weight": (q, c.hidden),
            p + "self_attn.k_proj.weight": (kv, c.hidden),
            p + "self_attn.v_proj.weight": (kv, c.hidden),
            p + "self_attn.o_proj.weight": (c.hidden, q),
        }
        if c.qk_norm:
            shapes |= {p + f"self_attn.{x}_norm.weight": (c.kv_channels,) for x in "qk"}
        if c.experts:
            shapes[p + "mlp.gate.weight"] = (c.experts, c.hidden)
        for mlp in [f"mlp.experts.{e}." for e in range(c.experts)] or ["mlp."]:
            shapes |= {
                p + mlp + "gate_proj.weight": (c.ffn, c.hidden),
                p + mlp + "up_proj.weight": (c.ffn, c.hidden),
                p + mlp + "down_proj.weight": (c.hidden, c.ffn),
            }
    return shapes


def parameters_of(c) -> list[Parameter]:
    """Every parameter of Megatron's model on one rank, by formula."""
    q, kv = c.heads * c.kv_channels, c.num_query_groups * c.kv_channels
    shapes = {
        "embedding.word_embeddings.weight": (c.vocab_size, c.hidden),
        "decoder.final_layernorm.weight": (c.hidden,),
        "output_layer.weight": (c.vocab_size, c.hidden),
    }
    for layer in range(c.num_layers):
        p = f"decoder.layers.{layer}."
        shapes |= {
            p + "self_attention.linear_qkv.layer_norm_weight": (c.hidden,),
            p + "self_attention.linear_qkv.weight": (q + 2 * kv, c.hidden),
            p + "self_attention.linear_proj.weight": (c.hidden, q),
        }
        if c.qk_norm:
            shapes |= {p + f"self_attention.{x}_layernorm.weight": (c.kv_channels,) for x in "qk"}
        if c.experts:
            shapes |= {p + "pre_mlp_layernorm.weight": (c.hidden,), p + "mlp.router.weight": (c.experts, c.hidden)}
            for e in range(c.experts):
                shapes |= {
                    p + f"mlp.experts.linear_fc1.weight{e}": (2 * c.ffn, c.hidden),
                    p + f"mlp.experts.linear_fc2.weight{e}": (c.hidden, c.ffn),
                }
        else:
            shapes |= {
                p + "mlp.linear_fc1.layer_norm_weight": (c.hidden,),
                p + "mlp.linear_fc1.weight": (2 * c.ffn, c.hidden),
                p + "mlp.linear_fc2.weight": (c.hidden, c.ffn),
            }
    return [Parameter(name, shape) for name, shape in shapes.items()]


def held_in(layout: Layout, parameters: list[Parameter], registry, c):
    """What each (stage, expert rank) holds, by formula."""
    chunks = layout.chunk_layers(c.num_layers)
    for pp in range(layout.pp):
        mine = {layer for k in range(pp, layout.num_chunks, layout.pp) for layer in chunks[k]}
        for ep in range(layout.ep):
            held = []
            for parameter in parameters:
                words = parameter.name.split(".")
                stage = layout.pp - 1 if words[0] == "output_layer" or words[1] == "final_layernorm" else 0
                here = int(words[2]) in mine if words[1] == "layers" else stage == pp
                if here and "experts" in words:
                    here = int(words[-1].removeprefix("weight")) in layout.experts(ep, c.experts)
                if here:
                    mapping, _ = registry.megatron_to_hf_lookup(parameter.name)
                    size = shard_of(mapping, layout, layout.coords(0)).size
                    held.append(Held(parameter.name, local_shape(mapping, parameter.shape, size)))
            yield (pp, ep), held


def prove_config(c, bridge, layout: Layout, hf_shapes) -> Coverage:
    """The proof for a config above, as the copy engine needs it."""
    registry = bridge().mapping_registry()
    provider = SimpleNamespace(**vars(c), padded_vocab_size=c.vocab_size, share_embeddings_and_output_weights=False)
    return prove_ranks(held_in(layout, parameters_of(c), registry, c), registry, hf_shapes, provider, layout)


@pytest.mark.parametrize(
    ("config", "bridge", "layout", "billions"),
    [
        (LLAMA_405B, LlamaBridge, "tp8-pp16-cp2-sp", 405.9),
        (LLAMA_405B, LlamaBridge, "tp16-pp16", 405.9),
        (QWEN3_235B, Qwen3MoeBridge, "tp8-pp16-ep16-etp4", 235.1),
        (QWEN3_235B, Qwen3MoeBridge, "tp4-pp8-ep64-etp1", 235.1),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_models_of_published_size_are_proven_from_shapes_alone(config, bridge, layout, billions):
    """Every element of every tensor exactly once, in layouts of hundreds of ranks (TP above the groups among them). The
    elements counted are the parameters that the model's card gives."""
    shapes = hf_shapes_of(config)
    coverage = prove_config(config, bridge, Layout.parse(layout), shapes)
    assert coverage.ok, coverage.errors[:3]
    assert coverage.hf_tensors == len(shapes)
    assert coverage.hf_elements == sum(map(math.prod, shapes.values()))
    assert round(coverage.hf_elements / 1e9, 1) == billions


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.layers.93.mlp.experts.127.up_proj.weight"), "experts.127.up_proj.weight is missing"),
        (
            lambda s: s.update({"model.layers.94.mlp.gate.weight": (128, 4096)}),
            "model.layers.94.mlp.gate.weight: no Meg",
        ),
        (
            lambda s: s.update({"model.layers.7.self_attn.o_proj.weight": (8192, 4096)}),
            "layers.7.self_attn.o_proj.weight",
        ),
    ],
    ids=["missing", "left over", "transposed"],
)
def test_one_wrong_tensor_among_36000_is_found(change, message):
    """In a checkpoint of published size: a tensor that is gone, one too many, one transposed."""
    shapes = hf_shapes_of(QWEN3_235B)
    change(shapes)
    coverage = prove_config(QWEN3_235B, Qwen3MoeBridge, Layout.parse("tp4-pp8-ep64-etp1"), shapes)
    assert not coverage.ok
    assert message in "; ".join(coverage.errors)


def test_a_parameter_that_a_layout_does_not_divide_has_no_local_shape():
    """tp3: the rows that cannot be cut, and by which number."""
    mapping = GatedMLPMapping("decoder.layers.*.mlp.linear_fc1.weight", gate="l.*.gate", up="l.*.up")
    with pytest.raises(PlanError, match=r"64 rows of \(64, 8\) cannot be divided by 3"):
        local_shape(mapping, (64, 8), 3)


@pytest.mark.parametrize(
    ("text", "layers", "experts"), [("tp8-pp16-ep64-etp1", 94, 128), ("tp2-pp8-vpp3-cp2-ep32-dp16", 94, 128)]
)
def test_every_expert_of_every_layer_has_one_home_among_1024_ranks(text, layers, experts):
    """Each (layer, expert) is on exactly one (pp, ep) coordinate, and on world / (pp x ep) ranks."""
    layout = Layout.parse(text)
    assert layout.world_size in (1024, 512)
    chunks = layout.chunk_layers(layers)
    homes, holders = {}, Counter()
    for rank in range(layout.world_size):
        at = layout.coords(rank)
        for c in range(at.pp, layout.num_chunks, layout.pp):
            for layer in chunks[c]:
                for expert in layout.experts(at.ep, experts):
                    homes.setdefault((layer, expert), set()).add((at.pp, at.ep))
                    holders[layer, expert] += 1
    assert len(homes) == layers * experts
    assert all(len(home) == 1 for home in homes.values())
    assert set(holders.values()) == {layout.world_size // (layout.pp * layout.ep)}
