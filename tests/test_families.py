"""Mechanisms of families by themselves: what a row's golden cannot show."""

from __future__ import annotations

import json

import pytest
import torch

import toy_models
from bridges import AutoBridge
from bridges.checkpoints.comparison import same_bytes
from bridges.checkpoints.reader import Checkpoint
from bridges.families.qwen3 import Qwen3Bridge
from bridges.mechanisms.decoder import DecoderProvider
from bridges.mechanisms.ropes import Tables
from bridges.model_bridge import ConfigError
from bridges.providers import cpu_substitutions
from harness import convert
from tests.bounds import assert_same
from tests.test_cpu_backend import needs_no_gpu


def provider_of(row: str, tmp_path, bridge=None, **changes):
    """The provider of a row's config after changes to it (None takes a field out)."""
    config = {k: v for k, v in {**toy_models.config_dict(row), **changes}.items() if v is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return AutoBridge.from_hf_pretrained(tmp_path, bridge=bridge).to_megatron_provider(load_weights=False)


@needs_no_gpu
@pytest.mark.parametrize("length", [8, 16, 17, 24])
def test_longrope_takes_its_long_factors_behind_the_original_length_only(length, tmp_path):
    """The row's golden is longer than the original length, 16; here are both sides of it."""
    cpu_substitutions.install()
    provider = provider_of("phi3_longrope", tmp_path)
    model = toy_models.build("phi3_longrope")
    cos, sin = model.model.rotary_emb(torch.zeros(1, length, 64), torch.arange(length)[None])
    (table,) = provider.tables().values()
    angles = Tables([table], interleaved=False, cp_group=None)(length)[:, 0, 0]
    assert_same(angles.cos() * table.factor, cos[0])
    assert_same(angles.sin() * table.factor, sin[0])


def test_tables_of_layer_types_are_transformers_own(tmp_path):
    """OLMo 3's yarn is about layers without a window, Gemma 3's linear scaling too."""
    for row in ("olmo3", "gemma3_text"):
        rotary = toy_models.build(row).model.rotary_emb
        for kind, table in provider_of(row, tmp_path).tables().items():
            assert_same(table.short, getattr(rotary, f"{kind}_inv_freq"))
            assert table.factor == getattr(rotary, f"{kind}_attention_scaling")


def test_a_layer_type_without_a_table_is_named():
    provider = DecoderProvider(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        rope_by_layer_type={"full_attention": {"rope_theta": 10000.0}},
        rope_layer_types=["full_attention", "sliding_attention"],
    )
    with pytest.raises(ValueError, match="layers of type sliding_attention have no entry in rope_by_layer_type"):
        provider.tables()


def test_a_provider_without_the_mechanism_that_a_config_asks_for_is_refused():
    """By name, with a provider that has it."""

    class Mutant(Qwen3Bridge):
        MEGATRON_DEFAULTS = {"post_norm": True}

    with pytest.raises(ConfigError, match=r"GPTModelProvider has no post_norm.*DecoderProvider"):
        Mutant().provider_bridge(type("HF", (), {"config": toy_models.hf_config("qwen3")}))


@pytest.mark.parametrize(
    ("changes", "shared", "groups"),
    [
        ({}, False, 2),  # Falcon-40B
        ({"num_ln_in_parallel_attn": 1}, True, 2),  # Falcon2-11B
        ({"new_decoder_architecture": False, "multi_query": True, "num_kv_heads": None}, True, 1),  # Falcon-7B
    ],
)
def test_falcons_of_all_ages_are_told_apart(changes, shared, groups, tmp_path):
    provider = provider_of("falcon", tmp_path, **changes)
    assert (provider.shared_norm, provider.num_query_groups) == (shared, groups)


def test_alibi_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="alibi = True: FalconBridge computes only alibi = False"):
        provider_of("falcon", tmp_path, alibi=True)


def test_a_norm_shared_by_blocks_that_follow_each_other_is_refused():
    provider = DecoderProvider(num_layers=2, hidden_size=64, num_attention_heads=4, shared_norm=True)
    with pytest.raises(ValueError, match="shared_norm without parallel_blocks"):
        provider.finalize()


def test_a_fused_loss_that_skips_the_softcap_is_refused():
    provider = DecoderProvider(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        logits_softcap=30.0,
        cross_entropy_loss_fusion=True,
        cross_entropy_fusion_impl="linear",
    )
    with pytest.raises(ValueError, match="skips this model's logits softcap"):
        provider.finalize()


@pytest.mark.parametrize("row", ["gemma2", "olmo2", "cohere2"])
def test_a_megatron_folder_holds_the_mechanisms_parameters(row, tmp_path):
    """Norms behind blocks, over whole projections and shared ones: saved in one layout, loaded in another, the same bits."""
    source = toy_models.write(row, tmp_path / "hf", shards=1)
    convert.import_checkpoint(source, tmp_path / "megatron", "tp2-pp2", None)
    convert.export_checkpoint(tmp_path / "megatron", tmp_path / "out", None, "tp1", None)
    with Checkpoint.open(source) as a, Checkpoint.open(tmp_path / "out") as b:
        assert same_bytes(a, b) == []
