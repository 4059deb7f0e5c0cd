"""Gated delta net and gated attention: wrong bridges are seen, checkpoints in every published form and dtype come home."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.qwen3_next.modeling_qwen3_next import l2norm as hf_l2norm

import toy_models
from bridges import Layout, LayoutError, ParamMapping, Part
from bridges.checkpoints.comparison import same_bytes
from bridges.checkpoints.reader import Checkpoint
from bridges.conversion.mapping import AutoMapping, MegatronMappingRegistry
from bridges.families.qwen3_5 import Qwen3_5Bridge
from bridges.families.qwen3_next import Qwen3NextBridge
from bridges.mechanisms import gdn
from bridges.mechanisms.blocks import either
from bridges.providers import cpu_substitutions
from bridges.providers.cpu_backend import l2norm
from harness.mechanisms import mechanisms, provider_of
from harness.ranks import jobs
from harness.ranks.pool import RankError, Ranks
from harness.sweep import verify
from tests import bounds, test_mutants
from tests.test_cpu_backend import needs_no_gpu
from tests.test_mutants import (
    ATTENTION,
    MLP,
    QKV,
    SHARED_GATE,
    Mutant,
    assert_green,
    ignoring,
    refused,
    replaced,
    run,
    swapped,
    with_fields,
)

pytestmark = needs_no_gpu

BLOCK = "model.layers.*.linear_attn"
IN_PROJ = "decoder.layers.*.self_attention.in_proj.weight"
CONV = "decoder.layers.*.self_attention.conv1d.weight"
Q, K, V = (f"model.layers.*.self_attn.{x}_proj.weight" for x in "qkv")
SIZES: dict[str, int | str] = {
    "d": "linear_key_head_dim",
    "e": "linear_value_head_dim",
    "r": "value_heads_per_key_head",
    "u": 1,
}
HEADS: dict[str, int | str] = {"g": "num_query_groups", "n": "heads_per_group", "d": "kv_channels"}


# -- wrong bridges -------------------------------------------------------------------------------------------------------


def uncut(parts) -> tuple[Part, ...]:
    """The same parts laid out as on one rank, and cut over ranks without a look at the seams."""
    return tuple(Part(p.hf, p.view.replace("t k", "u k").replace("-> t", "-> u")) for p in parts)


def reordered(parts, *order: int) -> tuple[Part, ...]:
    return tuple(parts[i] for i in order)


class ZeroCentredInside(gdn.GatedDeltaNetProvider):
    """Megatron's own reading of the norm inside a gated delta net: gamma - 1."""

    def layer_spec(self, vp_stage):
        return gdn.variant_specs.get_transformer_block_with_experimental_attention_variant_spec(self, vp_stage)


class InnerNormZeroCentred(Qwen3_5Bridge):
    def provider_bridge(self, hf_pretrained):
        provider = super().provider_bridge(hf_pretrained)
        provider.__class__ = ZeroCentredInside
        return provider


SEPARATE, PACKED = gdn.separate_projections(BLOCK), gdn.packed_projections(BLOCK)
CONV_PARTS = gdn._qkv(f"{BLOCK}.conv1d.weight", "o w")
QUERY, GATE = (Part(Q, f"(g n [{v}]) h -> g ; n d ; h") for v in ("*d | d", "d | *d"))
KEY, VALUE = (Part(x, "(g d) h -> g ; d ; h") for x in (K, V))
FULL = r"first to differ: layers\.1\.self_attention \("  # the first softmax layer of qwen3_5_text

CUT_ACROSS = replaced(Qwen3_5Bridge, ParamMapping(IN_PROJ, uncut(SEPARATE), sizes=SIZES))
PACKED_CUT_ACROSS = replaced(Qwen3NextBridge, ParamMapping(IN_PROJ, uncut(PACKED), sizes=SIZES))
CONV_CUT_ACROSS = replaced(Qwen3_5Bridge, ParamMapping(CONV, uncut(CONV_PARTS), sizes=SIZES))
UNGATED = (
    ParamMapping(QKV, (QUERY, KEY, VALUE), sizes=HEADS),
    ParamMapping(
        "mtp.layers.0.mtp_model_layer.self_attention.linear_qkv.weight",
        tuple(Part(p.hf.replace("model.layers.*", "mtp.layers.0"), p.view) for p in (QUERY, KEY, VALUE)),
        sizes=HEADS,
    ),
)
NO_GATE = with_fields(Qwen3_5Bridge, attention_output_gate=False)
NO_SHARED_GATE = with_fields(Qwen3NextBridge, moe_shared_expert_gate=False)

MUTANTS = [
    # Wrong on import and on export: the bytes come home, only the logits know.
    Mutant("in_proj cut across", "qwen3_5_text", CUT_ACROSS, {"logits": ATTENTION}, ("tp2",)),
    Mutant("packed in_proj cut across", "qwen3_next", PACKED_CUT_ACROSS, {"logits": ATTENTION}, ("tp2",)),
    Mutant("conv1d cut across", "qwen3_5_text", CONV_CUT_ACROSS, {"logits": ATTENTION}, ("tp2",)),
    Mutant(
        "in_proj cut across, from tp1",
        "qwen3_5_text",
        CUT_ACROSS,
        {
            "logits": ATTENTION,
            "roundtrip": r"rank 0: decoder\.layers\.0\.self_attention\.in_proj\.weight as imported in tp1 differs",
            "reload": r"layers\.0\.linear_attn\.in_proj",
        },
        ("tp1", "tp2"),
    ),
    Mutant(
        "conv1d q and k swapped",
        "qwen3_5_text",
        replaced(Qwen3_5Bridge, ParamMapping(CONV, reordered(CONV_PARTS, 1, 0, 2), sizes=SIZES)),
        {"logits": ATTENTION},
    ),
    Mutant(
        "in_proj b and a swapped",
        "qwen3_next",
        replaced(Qwen3NextBridge, ParamMapping(IN_PROJ, reordered(PACKED, 0, 1, 2, 3, 5, 4), sizes=SIZES)),
        {"logits": ATTENTION},
    ),
    Mutant(
        "in_proj v and z swapped",
        "qwen3_5_text",
        replaced(Qwen3_5Bridge, ParamMapping(IN_PROJ, reordered(SEPARATE, 0, 1, 3, 2, 4, 5), sizes=SIZES)),
        {"logits": ATTENTION},
    ),
    Mutant(
        "A_log and dt_bias swapped", "qwen3_next", swapped(Qwen3NextBridge, "A_log", "dt_bias"), {"logits": ATTENTION}
    ),
    Mutant(
        "query and gate swapped",
        "qwen3_5_text",
        replaced(Qwen3_5Bridge, ParamMapping(QKV, (GATE, QUERY, KEY, VALUE), sizes=HEADS)),
        {"logits": FULL},
    ),
    Mutant(
        "all queries, then all gates",
        "qwen3_5_text",
        replaced(
            Qwen3_5Bridge,
            ParamMapping(
                QKV,
                (
                    Part(Q, "([*g n d | g n d]) h -> g ; n d ; h"),
                    Part(Q, "([g n d | *g n d]) h -> g ; n d ; h"),
                    KEY,
                    VALUE,
                ),
                sizes=HEADS,
            ),
        ),
        {"logits": FULL},
    ),
    # Something of the model is not built.
    Mutant("gate dropped", "qwen3_5_text", NO_GATE, refused(r"q_proj\.weight .* as Megatron's .*linear_qkv\.weight")),
    Mutant(
        "gate ignored",
        "qwen3_5_text",
        replaced(NO_GATE, *UNGATED),
        {"complete": r"layers\.1\.self_attn\.q_proj\.weight .* covered by nothing", "logits": FULL},
        open=("roundtrip", "reload"),
    ),
    Mutant(
        "shared gate dropped",
        "qwen3_next",
        NO_SHARED_GATE,
        refused(r"layers\.0\.mlp\.shared_expert_gate\.weight is not"),
    ),
    Mutant(
        "shared gate ignored",
        "qwen3_next",
        ignoring(NO_SHARED_GATE, SHARED_GATE, "mtp.layers.*.mlp.shared_expert_gate.weight"),
        {"logits": MLP},
        open=("complete", "roundtrip", "reload"),
    ),
    # A config field misread: no tensor moves.
    Mutant(
        "zero-centred norms taken for plain",
        "qwen3_5_text",
        with_fields(Qwen3_5Bridge, layernorm_zero_centered_gamma=False),
        {"logits": ATTENTION},
    ),
    Mutant("inner norm taken for zero-centred", "qwen3_5_text", InnerNormZeroCentred, {"logits": ATTENTION}),
    Mutant(
        "layer types made an interval",
        "qwen3_5_text",
        with_fields(Qwen3_5Bridge, linear_attention_freq=4),
        refused(r"layers\.1\.linear_attn.* is missing"),
    ),
    Mutant(
        "all of rope",
        "qwen3_next",
        with_fields(Qwen3NextBridge, rotary_percent=1.0),
        {"config": "partial_rotary_factor", "logits": r"first to differ: layers\.1\.self_attention \("},
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name.replace(" ", "-"))
def test_a_wrong_bridge_is_seen(mutant):
    """The checks that can see it are red and say where; those that cannot are green."""
    test_mutants.test_a_wrong_bridge_is_seen_and_located(mutant)


@pytest.mark.parametrize("bridge", [Qwen3_5Bridge, Qwen3NextBridge])
def test_the_same_bridges_unharmed_are_green(bridge):
    """A subclass that changes nothing passes where the mutants fail."""
    row = bridge.registration.model_type
    assert_green(run(row, type("Unharmed", (bridge,), {}), ("tp1", "tp2")), ("tp1", "tp2"))


# -- gradients -----------------------------------------------------------------------------------------------------------


def test_gradients_agree_with_and_without_sequence_parallel():
    """The gated delta rule amplifies rounding: Hugging Face's own gradients in fp32 are 3e-5 from those in fp64."""
    report = verify("qwen3_5_text", layouts=["tp2", "tp2-sp", "cp2"], checks=["grads"])
    assert report.summary()["pass"] == 3, [c.detail for c in report.cells]
    assert all(c.value is not None and c.value < 1e-4 for c in report.cells)


def test_an_inner_norm_that_is_not_reduced_fails(monkeypatch):
    """Left to Megatron, the norm's gradient would be each rank's own."""
    monkeypatch.setattr(gdn, "_sum_over", lambda group, gradient: gradient)
    cell = verify("qwen3_5_text", layouts=["tp2"], checks=["grads"]).cells[0]
    assert cell.status == "fail"
    assert "gradient of model.layers.0.linear_attn.norm.weight" in cell.detail


# -- dtypes --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ranks():
    made = Ranks()
    yield made
    made.close()


def through_megatron(ranks: Ranks, folder: Path, layout: str, out: Path) -> dict[str, str]:
    """Import and export in a layout; {parameter: dtype} of rank 0."""
    parsed = Layout.parse(layout)
    ranks.use_for(parsed)
    built = ranks.run(parsed.world_size, jobs.build, str(folder), parsed)
    ranks.run(parsed.world_size, jobs.export, str(out))
    return {name: dtype for name, _, dtype in built[0].parameters}


def assert_same(source: Path, out: Path) -> None:
    with Checkpoint.open(source) as before, Checkpoint.open(out) as after:
        assert same_bytes(before, after) == []
        assert len(before.tensors) > 100


def rewritten(folder: Path, change) -> Path:
    """The checkpoint with every file's tensors {name: tensor} as `change` gives them, in place."""
    weight_map = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = {n: t.contiguous() for n, t in change(load_file(file)).items()}
        save_file(tensors, file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "weight_map": weight_map}))
    return folder


IN_FP32 = ("linear_attn.A_log", "linear_attn.norm.weight")


def islands(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As Qwen3.5 publishes them: A_log and the inner norm in fp32, with digits that bf16 does not have."""
    return {n: t.float() * 1.0001 if n.endswith(IN_FP32) else t for n, t in tensors.items()}


@pytest.mark.parametrize("layout", ["tp1", "tp2-ep2-sp", "pp2-vpp2"])
def test_a_bf16_checkpoint_comes_home_bit_by_bit(ranks, layout, tmp_path):
    """All of it in bf16, as Qwen3-Next and Qwen3.6 are published; Megatron keeps A_log and the inner norm in fp32."""
    folder = toy_models.write("qwen3_next", tmp_path / "hf", dtype=torch.bfloat16)
    dtypes = through_megatron(ranks, folder, layout, tmp_path / "out")
    assert_same(folder, tmp_path / "out")
    wide = {name.split(".self_attention.")[1] for name, dtype in dtypes.items() if dtype == "torch.float32"}
    assert wide == {"A_log", "out_norm.weight"}


@pytest.mark.parametrize("row", ["qwen3_5_text", "qwen3_5_moe_text"])
def test_fp32_islands_come_home_bit_by_bit(ranks, row, tmp_path):
    """Qwen3.5 is published in bf16 but for A_log and the inner norm."""
    folder = rewritten(toy_models.write(row, tmp_path / "hf", dtype=torch.bfloat16), islands)
    through_megatron(ranks, folder, "tp2", tmp_path / "out")
    assert_same(folder, tmp_path / "out")


def test_fp32_islands_do_not_fit_into_bf16(ranks, tmp_path, monkeypatch):
    """Without the provider's care the import refuses, and does not round."""
    monkeypatch.setattr(gdn, "GatedDeltaNet", type(None))
    folder = rewritten(toy_models.write("qwen3_5_text", tmp_path / "hf", dtype=torch.bfloat16), islands)
    with pytest.raises(RankError, match="float32 in the checkpoint and bfloat16 in Megatron: precision would be lost"):
        through_megatron(ranks, folder, "tp1", tmp_path / "out")


# -- forms on disk -------------------------------------------------------------------------------------------------------


def one_by_one(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts each for itself, as transformers saves a model that it has made."""
    out = {}
    for name, tensor in tensors.items():
        block, _, kind = name.partition(".experts.") if not name.startswith("mtp.") else (name, "", "")
        for e, matrix in enumerate(tensor if kind else ()):
            prefix = f"{block}.experts.{e}"
            if kind == "down_proj":
                out[f"{prefix}.down_proj.weight"] = matrix
            else:
                out[f"{prefix}.gate_proj.weight"], out[f"{prefix}.up_proj.weight"] = matrix.chunk(2)
        if not kind:
            out[name] = tensor
    return out


def of_language_model(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of the published vision-language checkpoints."""
    return {
        n.replace("model.", "model.language_model.", 1) if n.startswith("model.") else n: t for n, t in tensors.items()
    }


def test_the_toy_on_disk_is_fused_and_transformers_own_saving_is_not(tmp_path):
    """Published experts are two tensors a layer; `save_pretrained` alone would write them one by one."""
    folder = toy_models.write("qwen3_5_moe_text", tmp_path / "published")
    shapes = {name: tuple(info.shape) for name, info in Checkpoint.open(folder).tensors.items()}
    assert shapes["model.layers.3.mlp.experts.gate_up_proj"] == (8, 80, 64)
    assert shapes["model.layers.3.mlp.experts.down_proj"] == (8, 64, 40)
    assert not [name for name in shapes if ".experts.0." in name]
    toy_models.build("qwen3_5_moe_text").save_pretrained(tmp_path / "saved")
    assert "model.layers.3.mlp.experts.0.up_proj.weight" in Checkpoint.open(tmp_path / "saved").tensors


@pytest.mark.parametrize("change", [one_by_one, of_language_model, lambda t: of_language_model(one_by_one(t))])
def test_either_form_is_imported_and_exported(change, tmp_path):
    """The checkpoint's names decide; it comes back as it was."""
    folder = rewritten(toy_models.write("qwen3_5_moe_text", tmp_path / "hf"), change)
    layouts = ["tp1", "tp2-ep2-etp1-sp"]
    assert_green(run("qwen3_5_moe_text", None, layouts, folder=folder), layouts)


def test_half_a_form_is_refused(tmp_path):
    """A checkpoint with gate_up_proj fused and down_proj nowhere names what is missing."""
    drop = lambda tensors: {n: t for n, t in tensors.items() if "3.mlp.experts.down_proj" not in n}  # noqa: E731
    folder = rewritten(toy_models.write("qwen3_5_moe_text", tmp_path / "hf"), drop)
    cell = verify("qwen3_5_moe_text", layouts=["tp1"], checks=["complete"], folder=folder).cells[0]
    assert cell.status == "error"
    assert "model.layers.3.mlp.experts.down_proj is missing" in cell.detail


def test_variants_are_chosen_by_the_tensors_that_are_there():
    a, b, plain = "decoder.a.linear_proj.weight", "decoder.b.linear_proj.weight", "decoder.final_layernorm.weight"

    def registry():
        forms = either(
            [AutoMapping(a, "new.a"), AutoMapping(b, "new.b")], [AutoMapping(a, "old.a"), AutoMapping(b, "b")]
        )
        return MegatronMappingRegistry(*forms, AutoMapping(plain, "norm"))

    def chosen(*names):
        found = registry().for_tensors(names)
        return tuple(found.megatron_to_hf_lookup(n)[1][0].hf for n in (a, b, plain))

    assert chosen("new.a", "new.b", "norm") == ("new.a", "new.b", "norm")
    assert chosen("old.a", "b") == ("old.a", "b", "norm")
    assert chosen("old.a", "new.b") == ("old.a", "new.b", "norm")
    assert chosen() == ("new.a", "new.b", "norm")  # nothing is there: errors name the published form
    # A mapping that is not a variant is never passed over, so that a wrong name is an error.
    first = MegatronMappingRegistry(AutoMapping(a, "typo"), *registry()).for_tensors(("old.a", "b"))
    assert first.megatron_to_hf_lookup(a)[1][0].hf == "typo"


# -- layouts and configuration -------------------------------------------------------------------------------------------


def test_layouts_that_do_not_divide_the_heads_say_which_number():
    """Megatron shards heads of the gated delta net over tensor and context parallel together."""
    provider = gdn.GatedDeltaNetProvider(num_layers=8, hidden_size=64, num_attention_heads=8, ffn_hidden_size=64)
    provider.linear_num_key_heads, provider.linear_num_value_heads = 4, 8
    provider.apply_layout("tp2-cp2").check_layout()
    with pytest.raises(LayoutError, match="4 linear key heads cannot be divided by tp=8 x cp=1 = 8"):
        provider.apply_layout("tp8").check_layout()
    with pytest.raises(LayoutError, match="4 linear key heads cannot be divided by tp=4 x cp=2 = 8"):
        provider.apply_layout("tp4-cp2").check_layout()


def test_unknown_layer_types_are_refused():
    config = toy_models.hf_config("qwen3_5_text")
    config.layer_types = ["sliding_attention", *config.layer_types[1:]]
    with pytest.raises(ValueError, match="layer_types has sliding_attention; known: full_attention, linear_attention"):
        Qwen3_5Bridge.hf_config_to_provider_kwargs(config)


def test_layer_types_come_back_from_an_interval():
    """Megatron's own short form, which a provider may have been given."""
    provider = gdn.GatedDeltaNetProvider(num_layers=4, linear_attention_freq=2)
    assert gdn.LAYER_TYPES.to_hf(provider) == {"layer_types": ["linear_attention", "full_attention"] * 2}


@pytest.mark.parametrize(
    ("row", "own"),
    [
        ("qwen3_next", {"MoE", "shared expert"}),
        ("qwen3_5_text", {"dense", "tied"}),
        ("qwen3_5_moe_text", {"MoE", "shared expert"}),
    ],
)
def test_rows_name_their_mechanisms(row, own):
    common = {"GDN", "gated attention", "q/k norm", "zero-centred norm", "partial rotary", "MTP"}
    assert set(mechanisms(provider_of(row))) == common | own


# -- substitutions -------------------------------------------------------------------------------------------------------


def test_l2norm_is_flas():
    """As transformers has it too: epsilon counts for short vectors, and statistics are fp32 for bf16 ones."""
    x = torch.randn(3, 5, 8, generator=torch.manual_seed(0)) * torch.tensor([1e-4, 1e-2, 1.0])[:, None, None]
    for i in range(3):  # each length on its own: together the long ones hide the short
        bounds.assert_same(l2norm(x[i]), hf_l2norm(x[i]))
    bounds.assert_apart(l2norm(x), x / x.norm(dim=-1, keepdim=True), least=1e-2)
    assert torch.equal(l2norm(x.bfloat16()), hf_l2norm(x.bfloat16().float()).bfloat16())


def test_compiled_methods_run_as_written(monkeypatch):
    """Megatron hands small methods to torch.compile, which would start a C++ compiler in every rank."""
    from megatron.core.ssm.gated_delta_net.common import _GDNBase

    cpu_substitutions.install()

    def refuse(*args, **kwargs):
        raise AssertionError("compiled")

    monkeypatch.setattr(torch._dynamo.convert_frame.ConvertFrame, "__call__", refuse)
    zeros = torch.zeros(2)
    g, beta = _GDNBase._compute_g_and_beta(None, zeros, zeros, zeros, zeros)  # type: ignore[arg-type]
    bounds.assert_same(g, -torch.log(torch.tensor(2.0)).expand(2))
    assert (beta == 0.5).all()
    torch.compiler.set_stance("default")
    try:
        with pytest.raises(Exception, match="compiled"):
            _GDNBase._compute_g_and_beta(None, zeros, zeros, zeros, zeros)  # type: ignore[arg-type]
    finally:
        torch.compiler.set_stance("force_eager")
