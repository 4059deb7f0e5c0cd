"""All hypothesis strategies of the tests."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

import toy_models
from bridges import (
    ColumnParallelMapping,
    ConcatenatedGatedMLPMapping,
    ConcatenatedQKVMapping,
    GatedMLPMapping,
    Layout,
    LayoutError,
    ParamMapping,
    Part,
    QKVMapping,
    ReplicatedMapping,
    RowParallelMapping,
)
from bridges.checkpoints.reader import DTYPES, SINGLE_FILE


@st.composite
def checkpoint_tensors(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of any dtype a checkpoint may hold, 0 to 3 dims of 0 to 4, all bits random: also NaN."""
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    nbytes = count * dtype.itemsize
    content = torch.frombuffer(bytearray(draw(st.binary(min_size=nbytes, max_size=nbytes))), dtype=torch.uint8)
    return (content & 1 if dtype == torch.bool else content).view(dtype).view(shape)


@st.composite
def checkpoint_files(draw: st.DrawFn) -> dict[str, dict[str, torch.Tensor]]:
    """{file: {tensor name: tensor}}, 1 to 3 files with Hugging Face's names, any Unicode in the tensors'."""
    names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
    tensors = draw(st.dictionaries(names, checkpoint_tensors(), min_size=1, max_size=8))
    count = draw(st.integers(1, min(3, len(tensors))))
    if count == 1:
        return {SINGLE_FILE: tensors}
    files = {f"model-{i + 1:05}-of-{count:05}.safetensors": {} for i in range(count)}
    for i, (name, tensor) in enumerate(tensors.items()):
        files[list(files)[i % count]][name] = tensor
    return files


# Layouts and conversions.


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Any layout that can be: every axis 1 to 4, an explicit split or none."""
    axes = {axis: draw(st.integers(1, 4)) for axis in ("tp", "pp", "ep", "cp", "dp")}
    axes["vpp"] = draw(st.integers(1, 3)) if axes["pp"] > 1 else 1
    etp = draw(st.none() | st.integers(1, 4))
    chunks = axes["pp"] * axes["vpp"]
    split = draw(st.none() | st.lists(st.integers(0, 5), min_size=chunks, max_size=chunks).map(tuple))
    sp = draw(st.booleans()) if axes["tp"] > 1 else False
    try:
        return Layout(**axes, etp=etp, sp=sp, split=split)
    except LayoutError:  # a data-parallel size that leaves no room for the experts: take the smallest that does
        return Layout(**{**axes, "dp": 1}, etp=etp, sp=sp, split=split)


@dataclass(frozen=True)
class Conversion:
    """Hugging Face tensors and the Megatron parameters they become, with the tensor-parallel sizes that divide.

    `shape` is that of each parameter in `names` on one rank (tp = 1); `dims` are the numbers drawn.
    """

    kind: str
    mapping: ParamMapping
    names: tuple[str, ...]
    hf_shapes: dict[str, tuple[int, ...]]
    shape: tuple[int, ...]
    sizes: dict[str, int]
    dims: dict[str, int]
    tps: tuple[int, ...]


def divisors(number: int, most: int = 16) -> tuple[int, ...]:
    return tuple(d for d in range(1, most + 1) if number % d == 0)


def _attention(dims: dict[str, int]) -> dict[str, int]:
    return {symbol: dims[symbol] for symbol in ("g", "n", "d")}


def _qkv(draw, dims, bias, fused) -> Conversion:
    g, n, d, h = (dims[s] for s in "gndh")
    kind = "bias" if bias else "weight"
    rows = {"q": g * n * d, "k": g * d, "v": g * d}
    tail = () if bias else (h,)
    megatron = f"decoder.layers.*.self_attention.linear_qkv.{kind}"
    if fused:
        mapping = ConcatenatedQKVMapping(megatron, f"layers.*.qkv_proj.{kind}")
        shapes = {f"layers.3.qkv_proj.{kind}": (sum(rows.values()), *tail)}
    else:
        mapping = QKVMapping(megatron, **{p: f"layers.*.{p}_proj.{kind}" for p in rows})
        shapes = {f"layers.3.{p}_proj.{kind}": (count, *tail) for p, count in rows.items()}
    name, shape = megatron.replace("*", "3"), (sum(rows.values()), *tail)
    return Conversion("qkv", mapping, (name,), shapes, shape, _attention(dims), dims, divisors(shape[0]))


def _gated(draw, dims, fused) -> Conversion:
    f, h = dims["f"] * dims["t"], dims["h"]
    megatron = "decoder.layers.*.mlp.linear_fc1.weight"
    if fused:
        mapping = ConcatenatedGatedMLPMapping(megatron, "layers.*.gate_up_proj.weight")
        shapes = {"layers.0.gate_up_proj.weight": (2 * f, h)}
    else:
        mapping = GatedMLPMapping(megatron, gate="layers.*.gate.weight", up="layers.*.up.weight")
        shapes = {"layers.0.gate.weight": (f, h), "layers.0.up.weight": (f, h)}
    return Conversion("gated", mapping, (megatron.replace("*", "0"),), shapes, (2 * f, h), {}, dims, divisors(f))


def _one(draw, dims, which) -> Conversion:
    rows, h = dims["f"] * dims["t"], dims["h"]
    name, mapping, shape, tps = {
        "column": ("in_proj.weight", ColumnParallelMapping, (rows, h), divisors(rows)),
        "column bias": ("in_proj.bias", ColumnParallelMapping, (rows,), divisors(rows)),
        "row": ("linear_proj.weight", RowParallelMapping, (h, rows), divisors(rows)),
        "replicated": ("norm.weight", ReplicatedMapping, (rows,), (1, 2, 4)),
    }[which]
    kind = which.split()[0]
    return Conversion(kind, mapping(name, "it"), (name,), {"it": shape}, shape, {}, dims, tps)


def _vocabulary(draw, dims) -> Conversion:
    vocab, h = draw(st.integers(1, 40)), dims["h"]
    multiple = draw(st.sampled_from([1, 4, 16]))
    name = "embedding.word_embeddings.weight"
    padded = -(-vocab // multiple) * multiple
    return Conversion(
        "vocabulary",
        ColumnParallelMapping(name, "embed"),
        (name,),
        {"embed": (vocab, h)},
        (padded, h),
        {},
        dims,
        (1, 2, 3, 4, 8),
    )


def _experts(draw, dims, which) -> Conversion:
    e, f, h = dims["e"], dims["f"] * dims["t"], dims["h"]
    fc = "linear_fc2" if which == "down" else "linear_fc1"
    megatron = f"decoder.layers.*.mlp.experts.{fc}.weight*"
    gate_up = {
        "rows": ("e ([{}t f | {}t f]) h -> t ; f ; h", (e, 2 * f, h)),
        "columns": ("e h ([{}t f | {}t f]) -> t ; f ; h", (e, h, 2 * f)),
        "interleaved": ("e (t f [{}u | {}u]) h -> t ; f u ; h", (e, 2 * f, h)),
    }
    if which == "down":
        mapping = ParamMapping(megatron, (Part("layers.*.down", "e o (t i) -> t ; o ; i"),), sharding="row")
        shapes, shape = {"layers.1.down": (e, h, f)}, (h, f)
    elif which == "apart":
        mapping = GatedMLPMapping(megatron, gate="layers.*.experts.*.gate", up="layers.*.experts.*.up")
        shapes = {f"layers.1.experts.{i}.{p}": (f, h) for i in range(e) for p in ("gate", "up")}
        shape = (2 * f, h)
    else:
        view, hf_shape = gate_up[which]
        parts = tuple(Part("layers.*.gate_up", view.format(*marks)) for marks in (("*", ""), ("", "*")))
        mapping = ParamMapping(megatron, parts, sizes={"u": 1})
        shapes, shape = {"layers.1.gate_up": hf_shape}, (2 * f, h)
    names = tuple(f"decoder.layers.1.mlp.experts.{fc}.weight{i}" for i in range(e))
    return Conversion(f"experts {which}", mapping, names, shapes, shape, {"u": 1}, dims, divisors(f))


def _packed(draw, dims) -> Conversion:
    """Gated DeltaNet as Qwen3-Next packs it: per key head q, k, then v and z of its r value heads; b and a apart."""
    t, k, d, r, e, h = (dims[s] for s in ("t", "g", "d", "n", "e", "h"))
    heads = t * k
    qkvz = [
        " | ".join(("*" if i == pick else "") + w for i, w in enumerate(("d", "d", "r e", "r e"))) for pick in range(4)
    ]
    ba = ["*r | r", "r | *r"]
    features = ["k d", "k d", "k r e", "k r e", "k r", "k r"]
    parts = tuple(
        Part(source, f"(t k [{segments}]) h -> t ; {feature} ; h")
        for source, segments, feature in zip(["qkvz"] * 4 + ["ba"] * 2, qkvz + ba, features, strict=True)
    )
    name = "decoder.layers.0.self_attention.in_proj.weight"
    shapes = {"qkvz": (heads * 2 * (d + r * e), h), "ba": (heads * 2 * r, h)}
    rows = shapes["qkvz"][0] + shapes["ba"][0]
    return Conversion(
        "packed",
        ParamMapping(name, parts, sizes={"d": d, "r": r, "e": e}),
        (name,),
        shapes,
        (rows, h),
        {"d": d, "r": r, "e": e},
        dims,
        divisors(heads),
    )


_KINDS = {
    "qkv": lambda draw, dims: _qkv(draw, dims, draw(st.booleans()), fused=False),
    "fused qkv": lambda draw, dims: _qkv(draw, dims, draw(st.booleans()), fused=True),
    "gated": lambda draw, dims: _gated(draw, dims, fused=False),
    "fused gated": lambda draw, dims: _gated(draw, dims, fused=True),
    "one": lambda draw, dims: _one(draw, dims, draw(st.sampled_from(["column", "column bias", "row", "replicated"]))),
    "vocabulary": _vocabulary,
    "experts": lambda draw, dims: _experts(
        draw, dims, draw(st.sampled_from(["rows", "columns", "interleaved", "down", "apart"]))
    ),
    "packed": _packed,
}
CONVERSIONS = tuple(_KINDS)


@st.composite
def conversions(draw: st.DrawFn, kind: str) -> Conversion:
    """A conversion of one of the CONVERSIONS, its dims random: also one group, one head, one channel."""
    dims = {
        symbol: draw(st.integers(1, most))
        for symbol, most in {"g": 6, "n": 4, "d": 4, "h": 4, "f": 3, "e": 3, "t": 4}.items()
    }
    return _KINDS[kind](draw, dims)


def values(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Finite tensors of a dtype in which no two elements are alike, as far as it has so many numbers."""
    start, tensors = 1, {}
    for name, shape in shapes.items():
        count = math.prod(shape)
        numbers = torch.arange(start, start + count)
        if dtype.itemsize == 2:  # bit patterns: consecutive numbers of 16 bits, none of them infinite
            tensors[name] = (numbers % 31_000).to(torch.int16).view(dtype).view(shape)
        else:
            tensors[name] = numbers.to(dtype).view(shape)
        start += count
    return tensors


@st.composite
def layouts_of_size(draw: st.DrawFn, tps: tuple[int, ...], experts: int, most: int = 16) -> Layout:
    """Any layout of at most `most` ranks whose tensor-parallel sizes are among `tps` and whose expert-parallel size divides
    the experts, over every axis: tp, pp, vpp, ep, etp, cp, sp, dp and an explicit split."""
    small = [tp for tp in tps if tp <= 4]
    tp = draw(st.sampled_from(small))
    etp = draw(st.sampled_from([n for n in small if n <= 2])) if experts else None
    ep = draw(st.sampled_from([n for n in divisors(experts, 4)])) if experts else 1
    pp, cp, dp = (draw(st.sampled_from(sizes)) for sizes in ((1, 2, 3), (1, 2), (1, 2)))
    vpp = draw(st.sampled_from((1, 2))) if pp > 1 else 1
    chunks = pp * vpp
    split = draw(st.none() | st.lists(st.integers(1, 3), min_size=chunks, max_size=chunks).map(tuple))
    sp = draw(st.booleans()) if tp > 1 else False
    for pp_, cp_, dp_ in ((pp, cp, dp), (pp, cp, 1), (pp, 1, 1), (1, 1, 1)):  # the first that is small enough
        fields = {"vpp": vpp if pp_ > 1 else 1, "split": split if pp_ > 1 else None}
        try:
            layout = Layout(tp=tp, pp=pp_, cp=cp_, dp=dp_, ep=ep, etp=etp, sp=sp, **fields)
        except LayoutError:  # no room for the experts with this data-parallel size
            continue
        if layout.world_size <= most:
            return layout
    return Layout(tp=tp, ep=ep, etp=etp, sp=sp)


# Whole models.

FAMILIES = tuple(row for row in toy_models.rows() if "-square" not in row)
_EXPERTS = ("num_experts", "n_routed_experts", "moe_num_experts", "num_local_experts")
_MTP = ("num_nextn_predict_layers", "mtp_num_hidden_layers")


def _layers(draw: st.DrawFn, config: dict) -> None:
    """Fewer layers: what is said layer by layer is cut but for the last, of whose kind the layers of MTP are."""
    least = config.get("first_k_dense_replace", 1) + 1
    every = config.get("full_attention_interval", 1) if "layer_types" not in config else 1
    count = config["num_hidden_layers"] = draw(st.integers(max(least, 3), 6).filter(lambda n: n % every == 0))
    for key in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        if key in config:
            config[key] = [*config[key][: count - 1], config[key][-1]]
    if "moe_layer_end_index" in config:
        config["moe_layer_end_index"] = count - 1
    if "max_window_layers" in config:
        config["max_window_layers"] = min(config["max_window_layers"], count)


def groups_field(config: dict) -> str:
    """What the family calls its query groups."""
    return "num_kv_heads" if "num_kv_heads" in config else "num_key_value_heads"


def _heads(draw: st.DrawFn, config: dict) -> None:
    groups = draw(st.sampled_from((1, 2, 4)))
    if "kv_lora_rank" in config:  # latent attention has no groups
        config["num_attention_heads"] = 4 * groups
        if "num_key_value_heads" in config:
            config["num_key_value_heads"] = 4 * groups
        config["hidden_size"] = draw(st.sampled_from((32, 48, 64)))
        return
    config[groups_field(config)] = groups
    heads = config["num_attention_heads"] = groups * draw(st.sampled_from((1, 2, 3)))
    # A multiple of the heads also where head_dim is given: Llama's config class insists.
    config["hidden_size"] = heads * (draw(st.sampled_from((8, 16, 24))) if "head_dim" in config else 16)


def _experts_of(draw: st.DrawFn, config: dict) -> int | None:
    key = next((key for key in _EXPERTS if key in config), None)
    if key is not None:
        config[key] = draw(st.sampled_from((8, 16)))
        return config[key]
    return None


@st.composite
def family_configs(draw: st.DrawFn, row: str) -> tuple[dict, Layout]:
    """(a toy row's file with other dims, groups, experts, layers, tied or untied, with or without heads of multi-token
    prediction; a layout that fits it)."""
    config = toy_models.row_file(row)
    _layers(draw, config)
    _heads(draw, config)
    experts = _experts_of(draw, config)
    widths = {
        "intermediate_size": (16, 24, 40),
        "moe_intermediate_size": (8, 24),
        "shared_expert_intermediate_size": (16, 24),
    }
    for key, sizes in widths.items():
        if key in config:
            config[key] = draw(st.sampled_from(sizes))
    config["vocab_size"] = draw(st.integers(128, 150))  # the row's special tokens are below
    if "_mtp" not in config and "_reference" not in config and "tie_word_embeddings" in config:
        config["tie_word_embeddings"] = draw(st.booleans())
    if "_mtp" in config and any(key in config for key in _MTP) and draw(st.booleans()):
        del config["_mtp"]
        config |= {key: 0 for key in _MTP if key in config}
    heads, groups = config["num_attention_heads"], config.get(groups_field(config), config["num_attention_heads"])
    tps = tuple(tp for tp in (1, 2, 4) if heads % tp == 0 and (groups % tp == 0 or tp % groups == 0))
    layout = draw(layouts_of_size(tps, experts or 0, most=8))
    stages = min(layout.pp, config["num_hidden_layers"])
    vpp = layout.vpp if stages * layout.vpp <= config["num_hidden_layers"] and stages > 1 else 1
    return config, dataclasses.replace(layout, pp=stages, vpp=vpp, split=None)
