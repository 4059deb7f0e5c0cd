"""Wrong bridges, checkpoints and goldens: the checks that must see each one are red and say where, the rest stay green.

That a check stays green is stated too: what is done wrong both on import and on export cannot show in a round trip,
and nobody should take a green round trip for a proof.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file

import toy_models
from bridges import AutoMapping, GatedMLPMapping, Layout, MegatronModelBridge, ParamMapping, Part, auto_bridge
from bridges.checkpoints.writer import CheckpointWriter
from bridges.config_rules import NO_ROPE_LAYERS, WINDOW, Rule
from bridges.conversion.mapping import Resolved
from bridges.families.bailing import BailingMoeV2Bridge
from bridges.families.deepseek import DeepseekV2Bridge, DeepseekV3Bridge
from bridges.families.dots1 import Dots1Bridge
from bridges.families.ernie4_5_moe import Ernie45MoeBridge
from bridges.families.llama import LlamaBridge
from bridges.families.mistral import MistralBridge, MixtralBridge
from bridges.families.qwen2 import Qwen2Bridge, Qwen2MoeBridge
from bridges.families.qwen3 import Qwen3Bridge, Qwen3MoeBridge
from bridges.families.smollm3 import SmolLM3Bridge
from harness.checks.logits import localise
from harness.checks.subject import Bench, Subject
from harness.ranks import jobs
from harness.ranks.pool import Ranks
from harness.reference import goldens
from harness.report.cells import Cell
from harness.sweep import verify
from tests.bounds import roundings

CHECKS = ("config", "complete", "roundtrip", "logits", "reload")
Bridge = type[MegatronModelBridge]


# Ways to break a bridge. Each gives a subclass; nothing is registered.


def with_mappings(bridge: Bridge, change: Callable[[list[ParamMapping]], Iterable[ParamMapping]]) -> Bridge:
    """Its declarations as `change` makes them from the right ones."""

    class Mutant(bridge):
        def mapping_registry(self):
            registry = super().mapping_registry()
            return type(registry)(*change(registry.mappings))

    return Mutant


def renamed(bridge: Bridge, names: dict[str, str]) -> Bridge:
    """Every Hugging Face name has these words replaced; import and export stay each other's inverse."""
    pattern = re.compile("|".join(map(re.escape, names)))

    def change(mappings):
        for mapping in mappings:
            mapping.parts = tuple(Part(pattern.sub(lambda m: names[m[0]], p.hf), p.view) for p in mapping.parts)
        return mappings

    return with_mappings(bridge, change)


def swapped(bridge: Bridge, a: str, b: str) -> Bridge:
    return renamed(bridge, {a: b, b: a})


def replaced(bridge: Bridge, *new: ParamMapping) -> Bridge:
    """Other declarations for the Megatron parameters of `new`."""
    names = {m.megatron_param for m in new}
    return with_mappings(bridge, lambda old: [*(m for m in old if m.megatron_param not in names), *new])


def without(bridge: Bridge, megatron_param: str) -> Bridge:
    """One declaration left out."""
    return with_mappings(bridge, lambda old: [m for m in old if m.megatron_param != megatron_param])


def with_fields(bridge: Bridge, **fields) -> Bridge:
    """Provider fields fixed, whatever config.json says."""

    class Mutant(bridge):
        @classmethod
        def hf_config_to_provider_kwargs(cls, config):
            return {**super().hf_config_to_provider_kwargs(config), **fields}

    return Mutant


def with_rule(bridge: Bridge, old: Rule, **changes) -> Bridge:
    """One of its two-way config rules changed."""
    assert any(rule is old for rule in bridge._rules())

    class Mutant(bridge):
        @classmethod
        def _rules(cls):
            return tuple(dataclasses.replace(r, **changes) if r is old else r for r in super()._rules())

    return Mutant


def exporting(bridge: Bridge, **fields: Callable) -> Bridge:
    """config.json fields computed from the provider in another way."""

    class Mutant(bridge):
        @classmethod
        def megatron_to_hf_config(cls, provider):
            config = super().megatron_to_hf_config(provider)
            return {**config, **{name: value(provider) for name, value in fields.items()}}

    return Mutant


def ignoring(bridge: Bridge, *patterns: str) -> Bridge:
    """Tensors that no mapping reads are waved through."""
    return type("Mutant", (bridge,), {"IGNORED_TENSORS": dict.fromkeys(patterns, "the mutant looks away")})


class Rotated(ParamMapping):
    """On real ranks of a layout with `axis` > 1, the number (layer or expert) in HF names is rotated by `by`.

    Import and export agree, and what is derived from shapes alone never sees it.
    """

    def __init__(self, mapping: ParamMapping, axis: str, by: int, wildcard: int, count: int):
        self.__dict__.update(mapping.__dict__)
        self.axis, self.by, self.wildcard, self.count = axis, by, wildcard, count

    def resolve(self, wildcards) -> tuple[Resolved, ...]:
        size = {
            "ep": parallel_state.get_expert_model_parallel_world_size,
            "pp": parallel_state.get_pipeline_model_parallel_world_size,
        }[self.axis]
        numbers = list(wildcards)
        if parallel_state.model_parallel_is_initialized() and size() > 1:
            numbers[self.wildcard] = str((int(numbers[self.wildcard]) + self.by) % self.count)
        return super().resolve(numbers)


def rotated(bridge: Bridge, where: str, **how) -> Bridge:
    """Its declarations for names that hold `where`, rotated."""
    return with_mappings(bridge, lambda old: [Rotated(m, **how) if where in m.megatron_param else m for m in old])


# The table.


@dataclass(frozen=True)
class Mutant:
    """`caught`: {check: what its detail must match} in the last of `layouts`. There the other checks are green, as
    all checks are in the layouts before. `open` lists checks of which nothing is said."""

    name: str
    row: str
    bridge: Bridge
    caught: dict[str, str]
    layouts: tuple[str, ...] = ("tp1",)
    open: tuple[str, ...] = ()


def refused(words: str) -> dict[str, str]:
    """The import raises an error, so that no check can pass."""
    return dict.fromkeys(CHECKS, words)


EMBEDDING = r"first to differ: embedding \(.*vocabulary rows"
ATTENTION = r"first to differ: layers\.0\.self_attention \(.*q/k/v order"
MLP = r"first to differ: layers\.0\.mlp \(.*gate/up order"
EXPERTS = r"first to differ: layers\.1\.mlp \(.*router \(normalisation, bias, groups, scaling\)"

QKV = "decoder.layers.*.self_attention.linear_qkv.weight"
FC1, FC2 = "decoder.layers.*.mlp.linear_fc1.weight", "decoder.layers.*.mlp.experts.linear_fc2.weight*"
NORM_1, NORM_2 = "model.layers.*.input_layernorm.weight", "model.layers.*.post_attention_layernorm.weight"
GATE, UP = "model.layers.*.mlp.gate_proj.weight", "model.layers.*.mlp.up_proj.weight"
W2 = "model.layers.*.block_sparse_moe.experts.*.w2.weight"
BIASES = [f"model.layers.*.self_attn.{x}_proj.bias" for x in "qkv"]
SHARED_GATE = "model.layers.*.mlp.shared_expert_gate.weight"

# All query rows, then all key rows, then all value rows, where Megatron wants them group by group.
QKV_BY_KIND = ParamMapping(
    QKV, tuple(Part(f"model.layers.*.self_attn.{x}_proj.weight", "f h -> ; f ; h") for x in "qkv")
)
# Gate and up as one tall matrix, cut over ranks without a look at the seam.
CUT_ACROSS = replaced(LlamaBridge, ParamMapping(FC1, (Part(GATE, "f h -> ; f ; h"), Part(UP, "f h -> ; f ; h"))))
GATE_UP_IN_LAYER_5 = GatedMLPMapping(FC1.replace("*", "5"), gate=UP.replace("*", "5"), up=GATE.replace("*", "5"))
TRANSPOSED = replaced(MixtralBridge, ParamMapping(FC2, (Part(W2, "(t i) o -> t ; o ; i"),), sharding="row"))
ROTATED_EXPERTS = rotated(MixtralBridge, ".experts.", wildcard=1, axis="ep", by=4, count=8)
ROTATED_LAYERS = rotated(LlamaBridge, "decoder.layers.", wildcard=0, axis="pp", by=4, count=8)
ONE_NORM_TWICE = replaced(LlamaBridge, AutoMapping("decoder.layers.*.mlp.linear_fc1.layer_norm_weight", NORM_1))
NO_BIAS = with_fields(Qwen2Bridge, add_qkv_bias=False)
NO_SHARED_GATE = with_fields(Qwen2MoeBridge, moe_shared_expert_gate=False)
EPS_FORGOTTEN = {"CONFIG_MAPPING": [pair for pair in LlamaBridge.CONFIG_MAPPING if pair[0] != "rms_norm_eps"]}
# Wrong in both directions: a config goes through unchanged.
WINDOW_OFF_BY_ONE = with_rule(
    MistralBridge,
    WINDOW,
    to_megatron=lambda c: {"window_size": (c.sliding_window, 0)},
    to_hf=lambda p: {"sliding_window": p.window_size[0]},
)
NO_ROPE_INVERTED = with_rule(
    SmolLM3Bridge,
    NO_ROPE_LAYERS,
    to_megatron=lambda c: {"no_rope_freq": list(c.no_rope_layers)},
    to_hf=lambda p: {"no_rope_layers": list(p.no_rope_freq)},
)

MUTANTS = [
    # A tensor in another's place, on import and on export: the bytes come home, only the logits know.
    Mutant("q and k swapped", "llama2", swapped(LlamaBridge, "q_proj", "k_proj"), {"logits": ATTENTION}),
    Mutant("k and v swapped", "llama3", swapped(LlamaBridge, "k_proj", "v_proj"), {"logits": ATTENTION}),
    Mutant("q and k norm swapped", "qwen3", swapped(Qwen3Bridge, "q_norm", "k_norm"), {"logits": ATTENTION}),
    Mutant("qkv by kind", "llama3", replaced(LlamaBridge, QKV_BY_KIND), {"logits": ATTENTION}),
    Mutant("gate and up swapped", "llama3", swapped(LlamaBridge, "gate_proj", "up_proj"), {"logits": MLP}),
    Mutant(
        "gate and up swapped in layer 5",
        "llama3",
        replaced(LlamaBridge, GATE_UP_IN_LAYER_5),
        {"logits": r"first to differ: layers\.5\.mlp \("},
    ),
    Mutant(
        "norms swapped",
        "llama3",
        swapped(LlamaBridge, "input_layernorm", "post_attention_layernorm"),
        {"logits": ATTENTION},
    ),
    Mutant(
        "embedding and head swapped",
        "llama3",
        swapped(LlamaBridge, "model.embed_tokens", "lm_head"),
        {"logits": EMBEDDING},
    ),
    Mutant("square experts transposed", "mixtral-square", TRANSPOSED, {"logits": MLP}),
    Mutant("experts transposed", "mixtral", TRANSPOSED, refused(r"layers\.0\.block_sparse_moe\.experts\.0\.w2.*96")),
    # Right on one rank, wrong on two: a round trip in one layout is green, one across layouts is not.
    Mutant("gate and up cut across", "llama3", CUT_ACROSS, {"logits": MLP}, ("tp2",)),
    Mutant(
        "gate and up cut across, from tp1",
        "llama3",
        CUT_ACROSS,
        {
            "logits": MLP,
            "roundtrip": r"rank 0: decoder\.layers\.0\.mlp\.linear_fc1\.weight as imported in tp1 differs",
            "reload": r"layers\.0\.mlp\.(gate|up)_proj",
        },
        ("tp1", "tp2"),
    ),
    Mutant("experts rotated", "mixtral", ROTATED_EXPERTS, {"logits": MLP}, ("ep2",)),
    Mutant(
        "experts rotated, from tp1",
        "mixtral",
        ROTATED_EXPERTS,
        {
            "logits": MLP,
            "roundtrip": r"rank 0: decoder\.layers\.0\.mlp\.experts\.linear_fc1\.weight0 as imported in tp1 differs",
            "reload": r"layers\.0\.mlp\.experts",
        },
        ("tp1", "ep2"),
    ),
    Mutant("stages rotated", "llama3", ROTATED_LAYERS, {"logits": ATTENTION}, ("pp2",)),
    Mutant(
        "stages rotated, from tp1",
        "llama3",
        ROTATED_LAYERS,
        {"logits": ATTENTION, "roundtrip": r"decoder\.layers\.0\..* as imported in tp1", "reload": r"layers\.0\."},
        ("tp1", "pp2"),
    ),
    # Something left out or read twice.
    Mutant(
        "a norm without mapping",
        "llama3",
        without(LlamaBridge, "decoder.final_layernorm.weight"),
        refused(r"no mapping for Megatron parameter decoder\.final_layernorm\.weight"),
    ),
    Mutant(
        "a buffer without mapping",
        "dots1",
        without(Dots1Bridge, "decoder.layers.*.mlp.router.expert_bias"),
        refused(r"no mapping for Megatron parameter decoder\.layers\.1\.mlp\.router\.expert_bias"),
    ),
    Mutant(
        "one norm twice", "llama3", ONE_NORM_TWICE, refused(r"layers\.0\.post_attention_layernorm\.weight is not used")
    ),
    Mutant(
        "one norm twice, the other ignored",
        "llama3",
        ignoring(ONE_NORM_TWICE, NORM_2),
        {"complete": r"layers\.0\.input_layernorm\.weight.* 64 more than once", "logits": MLP},
        open=("roundtrip", "reload"),
    ),
    Mutant("qkv bias dropped", "qwen2", NO_BIAS, refused(r"layers\.0\.self_attn\.._proj\.bias is not used")),
    Mutant(
        "qkv bias ignored",
        "qwen2",
        ignoring(NO_BIAS, *BIASES),
        {"logits": ATTENTION},
        open=("complete", "roundtrip", "reload"),
    ),
    Mutant(
        "shared gate dropped",
        "qwen2_moe",
        NO_SHARED_GATE,
        refused(r"layers\.1\.mlp\.shared_expert_gate\.weight is not used"),
    ),
    Mutant(
        "shared gate ignored",
        "qwen2_moe",
        ignoring(NO_SHARED_GATE, SHARED_GATE),
        {"logits": r"first to differ: layers\.1\.mlp \("},
        open=("complete", "roundtrip", "reload"),
    ),
    Mutant(
        "dense layer ignored",
        "qwen2_moe",
        with_fields(Qwen2MoeBridge, moe_layer_freq=[1] * 8),
        refused(r"layers\.0\.mlp\.gate\.weight is missing"),
    ),
    Mutant(
        "head not tied",
        "llama3.2_tied",
        with_fields(LlamaBridge, share_embeddings_and_output_weights=False),
        refused(r"lm_head\.weight is missing: Megatron's output_layer\.weight"),
        ("pp2",),
    ),
    # A config field misread: no tensor moves.
    Mutant("eps forgotten", "llama3", type("Mutant", (LlamaBridge,), EPS_FORGOTTEN), refused("rms_norm_eps = 0.01")),
    Mutant(
        "eps wrong",
        "llama3",
        with_fields(LlamaBridge, layernorm_epsilon=1e-5),
        {"config": "rms_norm_eps: 1e-05 should be 0.01", "logits": ATTENTION},
    ),
    Mutant(
        "theta ignored",
        "llama3",
        with_fields(LlamaBridge, rotary_base=10000.0),
        {"config": "'rope_theta': 10000.0.* should be .*'rope_theta': 500000.0", "logits": ATTENTION},
    ),
    Mutant(
        "rope scaling ignored",
        "llama3.1_ropescale",
        with_fields(LlamaBridge, rope_scaling=None),
        {"config": "'default'.* should be .*'llama3'", "logits": ATTENTION},
    ),
    Mutant(
        "part of rope",
        "llama3",
        with_fields(LlamaBridge, rotary_percent=0.5),
        {"config": "partial_rotary_factor", "logits": ATTENTION},
    ),
    Mutant("window off by one", "mistral", WINDOW_OFF_BY_ONE, {"logits": ATTENTION}),
    Mutant(
        "window ignored",
        "mistral",
        with_fields(MistralBridge, window_size=None),
        {"config": "sliding_window: None should be 8", "logits": ATTENTION},
    ),
    Mutant("no-rope layers inverted", "smollm3", NO_ROPE_INVERTED, {"logits": ATTENTION}),
    # Green with norm_topk_prob true, which is why there is a row with false.
    Mutant("norm_topk ignored, true", "qwen3_moe", with_fields(Qwen3MoeBridge, moe_router_pre_softmax=False), {}),
    Mutant(
        "norm_topk ignored, false",
        "qwen3_moe_raw",
        with_fields(Qwen3MoeBridge, moe_router_pre_softmax=False),
        {"config": "norm_topk_prob: True should be False", "logits": MLP},
    ),
    Mutant(
        "activation wrong",
        "llama3",
        with_fields(LlamaBridge, activation_func=F.gelu),
        {"config": "hidden_act: 'gelu' should be 'silu'", "logits": MLP},
    ),
    Mutant(
        "head_dim ignored",
        "llama3.2_tied",
        with_fields(LlamaBridge, kv_channels=16),
        refused(r"self_attn\.o_proj\.weight .*Megatron holds \(64, 64\)"),
    ),
    Mutant(
        "routed scaling ignored",
        "dots1",
        with_fields(Dots1Bridge, moe_router_topk_scaling_factor=None),
        {"config": r"routed_scaling_factor: .* should be 1\.9", "logits": r"first to differ: layers\.1\.mlp \("},
    ),
    Mutant(
        "expert bias left out",
        "bailing_moe_v2",
        ignoring(
            with_fields(BailingMoeV2Bridge, moe_router_enable_expert_bias=False), "model.layers.*.mlp.gate.expert_bias"
        ),
        {"logits": EXPERTS},
        open=("complete", "roundtrip", "reload"),
    ),
    Mutant(
        "expert bias of a softmax left out",
        "ernie4_5_moe",
        ignoring(
            with_fields(Ernie45MoeBridge, moe_router_enable_expert_bias=False),
            "model.layers.*.mlp.moe_statics.e_score_correction_bias",
        ),
        {"logits": EXPERTS},
        open=("complete", "roundtrip", "reload"),
    ),
    Mutant(
        "groups ignored",
        "bailing_moe_v2",
        with_fields(BailingMoeV2Bridge, moe_router_num_groups=None, moe_router_group_topk=None),
        {"config": "n_group: 1 should be 4", "logits": EXPERTS},
    ),
    Mutant(
        "groups by their best expert",
        "bailing_moe_v2",
        with_fields(BailingMoeV2Bridge, moe_router_group_best=1),
        {"logits": EXPERTS},
    ),
    Mutant(
        "groups by the sum of their best",
        "deepseek_v2_topk4",
        with_fields(DeepseekV2Bridge, moe_router_group_best=None),
        {"logits": EXPERTS},
    ),
    Mutant(
        "groups ignored with softmax",
        "deepseek_v2_topk4",
        with_fields(DeepseekV2Bridge, moe_router_num_groups=None, moe_router_group_topk=None),
        {"config": "topk_method: 'greedy' should be 'group_limited_greedy'", "logits": EXPERTS},
    ),
    Mutant(
        "softmax scale from mscale",
        "kimi_k2",
        with_fields(DeepseekV3Bridge, mscale_all_dim=1.0),
        {"config": r"'mscale_all_dim': 1\.0.* should be .*'mscale_all_dim': 0\.8", "logits": ATTENTION},
    ),
    Mutant(
        "yarn ignored",
        "kimi_k2",
        with_fields(DeepseekV3Bridge, rope_type="rope"),
        {"config": r"'default'.* should be .*'yarn'", "logits": ATTENTION},
    ),
    Mutant(
        "latent norms with the wrong eps",
        "kimi_k2",
        with_fields(DeepseekV3Bridge, latent_norm_epsilon=None),
        {"logits": ATTENTION},
    ),
    # A config written wrong: Megatron is right, whoever loads the export is not.
    Mutant(
        "window exported without itself",
        "mistral",
        exporting(MistralBridge, sliding_window=lambda p: p.window_size[0]),
        {"config": "sliding_window: 7 should be 8"},
    ),
    Mutant(
        "positions exported from seq_length",
        "llama3",
        exporting(LlamaBridge, max_position_embeddings=lambda p: p.seq_length),
        {"config": "max_position_embeddings: 2048 should be 8192"},
    ),
    Mutant(
        "padded vocabulary in config.json",
        "llama3",
        exporting(LlamaBridge, vocab_size=lambda p: p.padded_vocab_size),
        {"reload": r"lm_head\.weight.*131.*132"},
        ("tp1", "tp4"),
    ),
]


def run(row: str, bridge: Bridge | None, layouts=("tp1",), checks=CHECKS, **options) -> dict[tuple[str, str], Cell]:
    """{(layout, check): cell}; `config` has a cell in the first layout alone."""
    report = verify(row, bridge=bridge, layouts=list(layouts), checks=checks, **options)
    assert report.ok == all(c.status == "pass" for c in report.cells)
    return {(c.layout, c.check): c for c in report.cells}


def assert_green(cells: dict[tuple[str, str], Cell], layouts, checks=CHECKS) -> None:
    """The checks are all there and have passed in every layout."""
    wanted = [(x, check) for x in layouts for check in checks if check != "config" or x == layouts[0]]
    assert wanted
    assert {where: cells[where].detail for where in wanted if cells[where].status != "pass"} == {}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name.replace(" ", "-"))
def test_a_wrong_bridge_is_seen_and_located(mutant):
    """The checks that can see it are red, with a detail that names the place; those that cannot are green."""
    *before, last = mutant.layouts
    cells = run(mutant.row, mutant.bridge, mutant.layouts)
    if before:
        assert_green(cells, before)
    for check in CHECKS:
        cell = cells.get((last, check))
        if cell is None:
            assert check == "config"
            assert before
        elif check in mutant.caught:
            assert cell.status in ("fail", "error"), f"{check} does not see it: {cell.detail}"
            assert re.search(mutant.caught[check], cell.detail), f"{check} does not say where: {cell.detail}"
        elif check not in mutant.open:
            assert cell.status == "pass", f"{check}: {cell.detail}"


@pytest.mark.parametrize("row", sorted({m.row for m in MUTANTS}))
def test_the_same_bridges_unharmed_are_green(row):
    """A subclass that changes nothing passes where the mutants fail: it is the change that the checks see."""
    mutants = [m for m in MUTANTS if m.row == row]
    layouts = sorted({layout for m in mutants for layout in m.layouts}, key=lambda text: Layout.parse(text).world_size)
    registered = next(b for b in mutants[0].bridge.__mro__ if b.registration and b.registration.bridge is b)
    cells = run(row, type("Unharmed", (registered,), {}), layouts)
    assert_green(cells, layouts)


# Errors outside a declaration: the code that carries it out, put in the place of the right one before ranks are forked.


def import_but(monkeypatch, when: Callable, then: Callable) -> None:
    """The import, after which `then(task)` is done to every task for which `when(task)`."""
    right = auto_bridge.import_weights

    def wrong(tasks, source, **options):
        right(tasks, source, **options)
        for task in tasks:
            if when(task):
                then(task)

    monkeypatch.setattr(auto_bridge, "import_weights", wrong)


def forget(task) -> None:
    """As if the import had passed the tensor by: the ranks fill all tensors with NaN before it."""
    with torch.no_grad():
        task.tensor.fill_(float("nan"))


def on_rank_1(task) -> bool:
    return torch.distributed.get_rank() == 1


@pytest.mark.parametrize(
    ("row", "name", "block"),
    [
        ("qwen3", "decoder.layers.3.self_attention.k_layernorm.weight", "self_attention"),
        ("dots1", "decoder.layers.3.mlp.router.expert_bias", "mlp"),
    ],
    ids=["norm", "buffer"],
)
def test_a_tensor_that_the_import_passes_by_still_holds_its_poison(monkeypatch, row, name, block):
    """One norm or one buffer of one layer on one rank: `complete` names tensor and rank. The export, which another rank
    writes, is as it should be."""
    import_but(monkeypatch, lambda task: task.param_name == name and on_rank_1(task), forget)
    cells = run(row, None, ("tp2",))
    assert (cells["tp2", "complete"].status, cells["tp2", "complete"].value) == ("fail", 1)
    assert cells["tp2", "complete"].detail == f"rank 1: {name} was not written by the import"
    assert cells["tp2", "roundtrip"].status == "fail"
    assert cells["tp2", "roundtrip"].detail == f"rank 1: {name} as imported in tp2 differs from the import here"
    assert cells["tp2", "logits"].status == "fail"
    assert f"first to differ: layers.3.{block}" in cells["tp2", "logits"].detail
    assert_green(cells, ("tp2",), ("config", "reload"))


def test_an_expert_bias_rounded_to_bfloat16_is_seen(monkeypatch):
    """As when the buffer goes through the model's dtype on the way in: tokens near a tie go to other experts, and the
    exported bias is not the source's."""
    import_but(
        monkeypatch,
        lambda task: task.param_name.endswith("expert_bias"),
        lambda task: task.tensor.copy_(task.tensor.bfloat16()),
    )
    cells = run("sarvam_moe", None)
    assert_green(cells, ("tp1",), ("config", "complete"))
    assert cells["tp1", "roundtrip"].status == "fail"
    assert re.search(r"layers\.\d\.mlp\.gate\.expert_bias", cells["tp1", "roundtrip"].detail)
    assert cells["tp1", "logits"].status == "fail"
    assert re.search(r"first to differ: layers\.\d\.mlp \(.*router", cells["tp1", "logits"].detail)
    assert cells["tp1", "reload"].status == "fail"


@pytest.mark.parametrize(
    ("change", "check", "says"),
    [
        ({"q_norm": "attention.key_layernorm.", "k_norm": "attention.query_layernorm."}, "logits", ATTENTION),
        ({"o_proj": "attention.output."}, "complete", r"layers\.0\.attention\.dense\.weight is missing"),
    ],
    ids=["swapped", "unknown"],
)
def test_a_row_with_a_wrong_rename_is_seen(monkeypatch, tmp_path, change, check, says):
    """The toy writes and reads by the same table, so that it cannot see its own mistake; the bridge does."""
    right = toy_models.reference_of("bailing_moe_v2")
    wrong = {**right, "tensors": [[p, next((v for k, v in change.items() if k in p), r)] for p, r in right["tensors"]]}
    assert wrong != right
    monkeypatch.setattr(toy_models.checkpoint, "reference_of", lambda row: wrong)
    cells = run("bailing_moe_v2", None)
    assert cells["tp1", check].status in ("fail", "error")
    assert re.search(says, cells["tp1", check].detail), cells["tp1", check].detail


def test_an_export_under_another_name_does_not_load(tmp_path):
    """The folder goes into the native class by the row's own table: a tensor that is not there is a missing key."""
    folder = toy_models.write("bailing_moe_v2", tmp_path / "hf", shards=1)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.attention.output.weight"] = tensors.pop("model.layers.3.attention.dense.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    _, info = toy_models.load("bailing_moe_v2", folder)
    assert set(info["missing_keys"]) == {"model.layers.3.self_attn.o_proj.weight"}
    assert set(info["unexpected_keys"]) == {"model.layers.3.attention.output.weight"}


def test_a_tied_head_that_stays_empty_on_the_last_stage_is_seen(monkeypatch):
    """On two stages head and embedding are two tensors; the second needs an import of its own."""
    import_but(monkeypatch, lambda task: task.alias_of is not None, forget)
    cells = run("llama3.2_tied", None, ("tp1", "pp2"))
    assert_green(cells, ("tp1",))
    assert cells["pp2", "complete"].status == "fail"
    assert cells["pp2", "complete"].detail == "rank 1: output_layer.weight was not written by the import"
    assert cells["pp2", "logits"].status == "fail"
    assert "all 17 blocks agree, the output does not" in cells["pp2", "logits"].detail
    assert "output head (tied?)" in cells["pp2", "logits"].detail


def test_a_tied_head_with_its_rows_moved_on_the_last_stage_is_seen(monkeypatch):
    """Nothing is missing and the head is not exported, so that `complete` and the exported bytes are as they should be;
    the tensors of another layout and the logits tell."""
    import_but(
        monkeypatch,
        lambda task: task.alias_of is not None,
        lambda task: task.tensor.data.copy_(task.tensor.data.roll(1, 0)),
    )
    cells = run("llama3.2_tied", None, ("tp1", "pp2"))
    assert_green(cells, ("tp1",))
    assert_green(cells, ("pp2",), ("complete", "reload"))
    assert cells["pp2", "roundtrip"].status == "fail"
    assert (
        cells["pp2", "roundtrip"].detail
        == "rank 1: output_layer.weight as imported in tp1 differs from the import here"
    )
    assert cells["pp2", "logits"].status == "fail"
    assert (
        "the output does not; look at: final norm or its epsilon, output head (tied?)" in cells["pp2", "logits"].detail
    )


def test_padded_vocabulary_rows_in_the_export_are_seen(monkeypatch):
    """131 tokens on 4 ranks are padded to 132 rows in Megatron; a Hugging Face tensor with 132 is wrong."""
    right = auto_bridge.CheckpointWriter

    def padded(path, files, **options):
        vocab = ("model.embed_tokens.weight", "lm_head.weight")
        return right(
            path,
            {
                file: {n: (dtype, (132, *shape[1:]) if n in vocab else shape) for n, (dtype, shape) in tensors.items()}
                for file, tensors in files.items()
            },
            **options,
        )

    monkeypatch.setattr(auto_bridge, "CheckpointWriter", padded)
    cells = run("llama3", None, ("tp4",))
    assert cells["tp4", "roundtrip"].status == "fail"
    assert "model.embed_tokens.weight: shape (131, 64) != (132, 64)" in cells["tp4", "roundtrip"].detail
    assert cells["tp4", "reload"].status == "fail"
    assert re.search(r"mismatched_keys: .*lm_head\.weight.*131.*132", cells["tp4", "reload"].detail)
    assert_green(cells, ("tp4",), ("config", "complete", "logits"))


def test_an_export_that_drops_a_tensor_is_seen(monkeypatch):
    """Both in the bytes and by whoever loads it."""
    right, name = auto_bridge.CheckpointWriter, "model.layers.2.mlp.up_proj.weight"

    class Dropping(right):
        def __init__(self, path, files, **options):
            files = {file: {n: plan for n, plan in tensors.items() if n != name} for file, tensors in files.items()}
            super().__init__(path, files, **options)

        def view(self, wanted):
            return torch.empty(96, 64) if wanted == name else super().view(wanted)

    monkeypatch.setattr(auto_bridge, "CheckpointWriter", Dropping)
    cells = run("llama3", None)
    assert cells["tp1", "roundtrip"].detail == f"{name}: missing"
    assert cells["tp1", "reload"].detail == f"missing_keys: {name}"
    assert_green(cells, ("tp1",), ("config", "complete", "logits"))


def test_a_source_that_the_import_writes_to_is_seen(monkeypatch, tmp_path):
    """In the very first layout, since the digest is taken before the import; in any safetensors file of the folder."""
    folder = toy_models.write("llama3", tmp_path / "hf", shards=1)
    stray = folder / "consolidated.safetensors"
    stray.write_bytes(b"before")
    assert_green(run("llama3", None, folder=folder), ("tp1",))
    import_but(monkeypatch, lambda task: True, lambda task: stray.write_bytes(b"after"))
    cells = run("llama3", None, folder=folder)
    assert (cells["tp1", "roundtrip"].status, cells["tp1", "roundtrip"].value) == ("fail", 1)
    assert cells["tp1", "roundtrip"].detail == "the source checkpoint was changed"
    assert_green(cells, ("tp1",), ("config", "complete", "logits", "reload"))


# Wrong checkpoints and goldens, with the right bridge.


def test_a_checkpoint_with_two_tensors_exchanged_is_seen(tmp_path):
    """Its bytes survive the round trip; they are not the row's."""
    folder = toy_models.write("llama3", tmp_path / "hf", shards=1)
    assert_green(run("llama3", None, folder=folder), ("tp1",))
    tensors = load_file(folder / "model.safetensors")
    a, b = (f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 6))
    tensors[a], tensors[b] = tensors[b], tensors[a]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    cells = run("llama3", None, folder=folder)
    assert_green(cells, ("tp1",), ("config", "complete", "roundtrip"))
    assert cells["tp1", "logits"].status == "fail"
    assert "first to differ: layers.1.mlp" in cells["tp1", "logits"].detail
    assert cells["tp1", "reload"].status == "fail"
    assert a in cells["tp1", "reload"].detail
    assert b in cells["tp1", "reload"].detail


@pytest.fixture
def own_golden(tmp_path, monkeypatch):
    """A function that gives llama3 a golden with other logits, or none; the repository's stays as it is."""
    right = goldens.load("llama3")
    monkeypatch.setattr(goldens, "FOLDER", tmp_path)

    def write(logits=right.logits, **provenance):
        tensors = {**right.tensors, "logits": logits.contiguous()}
        content = {**right.provenance, "tensors_hash": toy_models.weights_hash(tensors), **provenance}
        save_file(tensors, tmp_path / "llama3.safetensors", {"provenance": json.dumps(content)})
        return right

    return write


@pytest.mark.parametrize(("size", "status"), [(1e-6, "pass"), (1e-3, "fail")])
def test_a_golden_off_by_a_thousandth_is_seen(own_golden, size, status):
    """A relative error of 1e-3 in the golden is a failure that says how large it is, one of 1e-6 is not."""
    golden = own_golden()
    own = run("llama3", None, checks=("logits",))["tp1", "logits"].value
    noise = torch.randn(golden.logits.shape, generator=torch.Generator().manual_seed(0))
    own_golden(golden.logits + noise * size * golden.logits.norm() / noise.norm())
    cells = run("llama3", None, checks=("logits", "reload"))
    assert {c.status for c in cells.values()} == {status}
    # The triangle inequality: this processor's own rounding, that of the golden, and its size that changes too.
    assert cells["tp1", "logits"].value == pytest.approx(size, rel=0, abs=own + roundings(steps=1) + size**2)
    assert cells["tp1", "logits"].limit == 1e-4
    if status == "fail":
        assert "17 blocks agree, the output does not" in cells["tp1", "logits"].detail


def test_a_golden_that_is_missing_stale_or_edited_stops_the_run(own_golden, tmp_path):
    """No cell is made of it; the error says how to make it anew."""
    remedy = "goldengate golden regen llama3"
    with pytest.raises(ValueError, match=f"llama3 has no golden.*{remedy}"):
        run("llama3", None)
    for what in ("config", "weights"):
        own_golden(**{f"{what}_hash": "0" * 64})
        with pytest.raises(ValueError, match=f"llama3 is stale: it was made from another {what};.*{remedy}"):
            run("llama3", None)
    own_golden(tensors_hash="0" * 64)
    with pytest.raises(ValueError, match=f"llama3: the tensors do not match.*{remedy}"):
        run("llama3", None)


# The judge itself.


@pytest.mark.parametrize(
    ("layouts", "checks"), [(["tp1"], ()), ([], CHECKS), (["tp3"], CHECKS), (["ep2"], ("logits",))]
)
def test_a_report_that_compared_nothing_is_not_green(layouts, checks):
    """No checks, no layouts, or only layouts that cannot be: exit code 1."""
    report = verify("llama3", layouts=layouts, checks=checks)
    assert {c.status for c in report.cells} <= {"skip"}
    assert not report.ok
    assert report.exit_code == 1


@pytest.mark.parametrize("layout", ["tp1", "tp2-sp", "cp2", "pp2-vpp2", "tp2-ep2-etp1-sp"])
def test_the_localiser_finds_no_difference_where_there_is_none(layout, ranks, tmp_path):
    """In every layout the outputs of all blocks, put together from the ranks, are those of Hugging Face."""
    assert localised("qwen2_moe", layout, ranks, tmp_path).startswith("all 17 blocks agree")


@pytest.mark.parametrize("row", ["granite", "starcoder2", "falcon", "internlm", "gemma2"])
def test_the_localiser_knows_scaled_embeddings_biases_added_late_and_blocks_side_by_side(row, ranks, tmp_path):
    assert localised(row, "tp2-sp", ranks, tmp_path).startswith("all 17 blocks agree")


def localised(row: str, layout: str, ranks: Ranks, folder: Path) -> str:
    bench = Bench(Subject.make(row, folder), Layout.parse(layout), ranks, folder)
    bench.build()
    return localise(bench)


# Ranks at their own pace


@pytest.mark.parametrize("slow", [0, 1])
def test_an_export_waits_for_every_rank(slow, monkeypatch):
    """One rank opens its files late: nobody may rename them, or say that all is well, before it has written."""
    opened = CheckpointWriter.open

    def late(self):
        if torch.distributed.get_rank() == slow:
            time.sleep(0.5)
        opened(self)

    monkeypatch.setattr(CheckpointWriter, "open", late)
    report = verify("llama3", bridge=LlamaBridge, layouts=["tp2"], checks=["roundtrip"])
    assert report.ok, report.cells[0].detail


def test_an_export_fails_on_every_rank_when_one_cannot_write(monkeypatch):
    """The others do not wait for it, and nothing is left that looks like a checkpoint."""
    opened = CheckpointWriter.open

    def refuse(self):
        if torch.distributed.get_rank() == 1:
            raise OSError("no space left on device")
        opened(self)

    monkeypatch.setattr(CheckpointWriter, "open", refuse)
    cell = verify("llama3", bridge=LlamaBridge, layouts=["tp2"], checks=["roundtrip"]).cells[0]
    assert cell.status == "error"
    assert "no space left on device" in cell.detail


# Tensors that a bridge ignores.

SCALES = "model.layers.*.self_attn.kv_scale"  # of quantised caches, which inference engines keep in a checkpoint


def with_scales(folder: Path) -> dict[str, torch.Tensor]:
    """Adds them to a folder of one file; returns them."""
    tensors = load_file(folder / "model.safetensors")
    added = {SCALES.replace("*", str(i)): torch.rand(8) + 1 for i in range(8)}
    save_file(tensors | added, folder / "model.safetensors", {"format": "pt"})
    return added


def test_ignored_tensors_are_exported_as_they_are(tmp_path):
    """Not as zeros. A bridge that does not say that it ignores them is refused."""
    folder = toy_models.write("llama3", tmp_path / "hf", shards=1)
    with_scales(folder)
    layouts, checks = ("tp1", "tp2-pp2"), ("complete", "roundtrip", "logits", "grads")
    cells = run("llama3", ignoring(LlamaBridge, SCALES), layouts, checks=checks, folder=folder)
    assert_green(cells, layouts, checks)
    assert cells["tp2-pp2", "complete"].detail.endswith("; 8 tensors ignored, as the bridge says")
    [cell] = verify("llama3", layouts=["tp1"], checks=["roundtrip"], folder=folder).cells
    assert cell.status == "error"
    assert "kv_scale is not used by any Megatron parameter (and 7 more)" in cell.detail


def exported_live(key: str, folder: str) -> dict[str, torch.Tensor]:
    """On a rank: what a weight synchronisation would get of a toy imported in tp2."""
    jobs.build(folder, Layout(tp=2), key)
    this = jobs.current()
    return {name: tensor.clone() for name, tensor in this.bridge.export_hf_weights(this.chunks)}


def test_ignored_tensors_are_in_a_live_export(tmp_path):
    folder = toy_models.write("llama3", tmp_path / "hf", shards=1)
    added = with_scales(folder)
    jobs.INHERITED_BRIDGES["ignoring"] = ignoring(LlamaBridge, SCALES)
    with Ranks() as ranks:
        for found in ranks.run(2, exported_live, "ignoring", str(folder)):
            assert all(
                torch.equal(found[name], tensor) for name, tensor in load_file(folder / "model.safetensors").items()
            )
            assert found.keys() >= added.keys()
