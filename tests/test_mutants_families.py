"""Norms, factors, softcaps, ropes and the order of blocks done wrong: each dies by the check that can see it, which says
where. The config, which says the wrong thing back, may fail as well."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from bridges.families.cohere2 import Cohere2Bridge
from bridges.families.exaone4 import Exaone4Bridge
from bridges.families.falcon import FalconBridge
from bridges.families.gemma import Gemma2Bridge, Gemma3Bridge, GemmaBridge
from bridges.families.glm import GlmBridge
from bridges.families.granite import GraniteBridge, GraniteMoeBridge
from bridges.families.hunyuan import HunyuanDenseBridge
from bridges.families.llama import LlamaBridge
from bridges.families.nemotron import NemotronBridge
from bridges.families.olmo import Olmo2Bridge, Olmo3Bridge
from bridges.families.phi3 import Phi3Bridge
from bridges.mechanisms import branches, qk_norm
from tests.test_mutants import ATTENTION, EMBEDDING, MLP, Bridge, assert_green, ignoring, run, swapped, with_fields

CHECKS = ("roundtrip", "logits")
OUTPUT = "blocks agree, the output does not"


def changed(bridge: Bridge, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Bridge:
    """Provider fields as `change` makes them from the right ones."""

    class Mutant(bridge):
        @classmethod
        def hf_config_to_provider_kwargs(cls, config):
            right = super().hf_config_to_provider_kwargs(config)
            return {**right, **change(right)}

    return Mutant


def windows(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Layer 3, which sees everything or a window, has the other."""
    return {"window_attn_skip_freq": [f ^ (i == 3) for i, f in enumerate(kwargs["window_attn_skip_freq"])]}


def one_table(kwargs: dict[str, Any]) -> dict[str, Any]:
    """All layers have the table of those without a window."""
    tables = kwargs["rope_by_layer_type"]
    return {"rope_by_layer_type": dict.fromkeys(tables, tables["full_attention"])}


def no_attention_factor(kwargs: dict[str, Any]) -> dict[str, Any]:
    tables = kwargs["rope_by_layer_type"]
    return {"rope_by_layer_type": {**tables, "full_attention": {**tables["full_attention"], "attention_factor": 1.0}}}


def short_for_all(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"rope_scaling": {**kwargs["rope_scaling"], "original_max_position_embeddings": 64}}


def ropes_exchanged(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"no_rope_freq": [1 - x for x in kwargs["no_rope_freq"]]}


LAYER_3 = r"first to differ: layers\.3\.self_attention \("
MUTANTS = [
    ("attention softcap left out", "gemma2", with_fields(Gemma2Bridge, attention_softcap=None), ATTENTION),
    ("logits softcap left out", "gemma2", with_fields(Gemma2Bridge, logits_softcap=None), OUTPUT),
    ("softcaps exchanged", "gemma2", with_fields(Gemma2Bridge, attention_softcap=5.0, logits_softcap=3.0), ATTENTION),
    ("scale of the head dim", "gemma2", with_fields(Gemma2Bridge, softmax_scale=24**-0.5), ATTENTION),
    (
        "norm order exchanged",
        "gemma2",
        swapped(Gemma2Bridge, "post_attention_layernorm", "pre_feedforward_layernorm"),
        MLP,
    ),
    ("embedding not scaled", "gemma", with_fields(GemmaBridge, embedding_multiplier=1.0), EMBEDDING),
    ("gamma not zero-centred", "gemma", with_fields(GemmaBridge, layernorm_zero_centered_gamma=False), ATTENTION),
    ("one layer's window wrong", "gemma3_text", changed(Gemma3Bridge, windows), LAYER_3),
    ("one layer's window wrong", "exaone4", changed(Exaone4Bridge, windows), LAYER_3),
    ("second rope table ignored", "gemma3_text", changed(Gemma3Bridge, one_table), ATTENTION),
    ("yarn on windowed layers", "olmo3", changed(Olmo3Bridge, one_table), ATTENTION),
    ("attention factor left out", "olmo3", changed(Olmo3Bridge, no_attention_factor), LAYER_3),
    ("long factors ignored", "phi3_longrope", changed(Phi3Bridge, short_for_all), ATTENTION),
    ("rope where there is none", "exaone4", changed(Exaone4Bridge, ropes_exchanged), ATTENTION),
    ("rope where there is none", "cohere2", changed(Cohere2Bridge, ropes_exchanged), ATTENTION),
    ("halves rotated", "glm", with_fields(GlmBridge, rotary_interleaved=False), ATTENTION),
    (
        "logits multiplied, not divided",
        "granite",
        with_fields(GraniteBridge, logits_divisor=1.0, logits_multiplier=6.0),
        OUTPUT,
    ),
    ("residual multiplier left out", "granite", with_fields(GraniteBridge, residual_multiplier=1.0), MLP),
    ("residual multiplier left out", "granitemoe", with_fields(GraniteMoeBridge, residual_multiplier=1.0), MLP),
    ("embedding not multiplied", "granite", with_fields(GraniteBridge, embedding_multiplier=1.0), EMBEDDING),
    ("attention multiplier left out", "granite", with_fields(GraniteBridge, softmax_scale=None), ATTENTION),
    ("logit scale left out", "cohere2", with_fields(Cohere2Bridge, logits_multiplier=1.0), OUTPUT),
    ("norms exchanged", "falcon", swapped(FalconBridge, "ln_attn", "ln_mlp"), ATTENTION),
    (
        "post norms exchanged",
        "olmo2",
        swapped(Olmo2Bridge, "post_attention_layernorm", "post_feedforward_layernorm"),
        MLP,
    ),
    ("norm before the rope", "hunyuan_v1_dense", with_fields(HunyuanDenseBridge, qk_norm_after_rope=False), ATTENTION),
    (
        "gamma not zero-centred",
        "nemotron_dense",
        with_fields(NemotronBridge, layernorm_zero_centered_gamma=False),
        ATTENTION,
    ),
    (
        "output bias ignored",
        "internlm",
        ignoring(with_fields(LlamaBridge, attention_output_bias=False), "model.layers.*.self_attn.o_proj.bias"),
        ATTENTION,
    ),
]


@pytest.mark.parametrize(
    ("name", "row", "bridge", "says"), MUTANTS, ids=[f"{m[1]}-{m[0]}".replace(" ", "-") for m in MUTANTS]
)
def test_a_mechanism_done_wrong_is_seen_and_located(name, row, bridge, says):
    cells = run(row, bridge, checks=CHECKS)
    assert cells["tp1", "roundtrip"].status == "pass", cells["tp1", "roundtrip"].detail
    cell = cells["tp1", "logits"]
    assert cell.status == "fail", cell.detail
    assert re.search(says, cell.detail), cell.detail


@pytest.mark.parametrize(
    ("bridge", "row", "says"),
    [
        (with_fields(LlamaBridge, attention_output_bias=False), "internlm", r"o_proj\.bias is not used"),
        (with_fields(Olmo2Bridge, post_norm=False), "olmo2", r"layernorm\.weight is not used"),
        (with_fields(Olmo2Bridge, pre_norm=True), "olmo2", r"layers\.0\.\w+_layernorm\.weight"),
        (with_fields(Olmo2Bridge, whole_qk_norm=False), "olmo2", r"self_attn\.q_norm\.weight"),
        (
            with_fields(Gemma2Bridge, post_norm=False),
            "gemma2",
            r"post_(attention|feedforward)_layernorm\.weight is not used",
        ),
    ],
)
def test_a_module_left_out_or_added_is_refused_by_name(bridge, row, says):
    cell = run(row, bridge, checks=("complete",))["tp1", "complete"]
    assert cell.status == "error"
    assert re.search(says, cell.detail), cell.detail


def test_a_norm_of_each_rank_alone_is_right_on_one_rank_only(monkeypatch):
    """The statistics of a whole projection need the other ranks' heads."""
    monkeypatch.setattr(qk_norm, "reduce_from_tensor_model_parallel_region", lambda x, group: x * group.size())
    cells = run("olmo2", type("Unharmed", (Olmo2Bridge,), {}), ("tp1", "tp2"), CHECKS)
    assert_green(cells, ["tp1"], CHECKS)
    assert re.search(ATTENTION, cells["tp2", "logits"].detail)


@pytest.mark.parametrize("row", ["cohere2", "falcon"])
def test_blocks_one_after_the_other_are_seen(monkeypatch, row):
    """A feed-forward that reads what attention has added."""

    def forward(self, hidden_states, *args, **kwargs):
        attended, context = self._forward_attention(hidden_states, *args, **kwargs)
        self._attended = attended
        return self._forward_mlp(self.input_layernorm(attended)), context

    monkeypatch.setattr(branches.ParallelLayer, "forward", forward)
    bridge = {"cohere2": Cohere2Bridge, "falcon": FalconBridge}[row]
    cells = run(row, type("Unharmed", (bridge,), {}), checks=CHECKS)
    assert re.search(MLP, cells["tp1", "logits"].detail)
