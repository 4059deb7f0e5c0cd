"""Strangers' models: a toy keeps the structure of a published config, and verify proves it like a row of ours."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import toy_models
from harness import targets
from harness.checks.config import meant
from harness.mechanisms import mechanisms, provider_of, sample
from harness.reference import goldens
from harness.sweep import verify
from toy_models.shrink import ShrinkError, shrink, unshrunk

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "unsloth_version": "2024.9",
    "vocab_size": 128256,
}
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}


@pytest.mark.parametrize(
    ("config", "layouts"),
    [(LLAMA, "tp2-pp2-sp"), (QWEN3_MOE, "ep2"), (DEEPSEEK_V3, "tp2-ep2-etp1-sp")],
    ids=["llama", "qwen3_moe", "deepseek_v3"],
)
def test_a_published_config_is_verified_in_a_layout(config, layouts):
    """Every check of a live toy passes; the row says that its reference is live and shows the toy's config."""
    report = verify(config, layouts=layouts)
    assert {cell.check for cell in report.cells} == {"config", "complete", "roundtrip", "logits", "reload", "grads"}
    assert not [cell for cell in report.cells if cell.status != "pass"]
    [row] = report.rows
    assert row["reference"].startswith("live: transformers")
    assert row["toy"]["hidden_size"] <= 128
    assert row["row"] not in toy_models.rows()


def test_a_wrong_bridge_fails_on_a_strangers_model():
    """The live reference is evidence: a bridge with another epsilon does not get through."""
    from bridges.families.llama import LlamaBridge

    class Wrong(LlamaBridge):
        MEGATRON_DEFAULTS = {"rotary_percent": 1.0}

        def provider_bridge(self, hf_pretrained):
            provider = super().provider_bridge(hf_pretrained)
            provider.layernorm_epsilon *= 2
            return provider

    report = verify(LLAMA, bridge=Wrong, layouts="tp1")
    assert {cell.check for cell in report.cells if cell.status == "fail"} >= {"config", "logits", "grads"}


def test_the_toy_has_the_mechanisms_of_the_published_model():
    """Shrinking loses none: what the big provider has, the toy's has."""
    for config in (LLAMA, QWEN3_MOE, DEEPSEEK_V3):
        target = targets.resolve(config)
        with targets.as_rows([target]) as [row]:
            toy = set(mechanisms(provider_of(row)))
        from pathlib import Path

        from bridges import AutoBridge, PreTrainedCausalLM
        from bridges.hf_pretrained import load_config

        big = AutoBridge(PreTrainedCausalLM(load_config(config, Path("x"), trusted=False), config))
        assert set(mechanisms(big.to_megatron_provider(load_weights=False))) == toy


def test_shrinking_keeps_relations():
    toy = shrink(DEEPSEEK_V3)
    assert toy["num_attention_heads"] == toy["num_key_value_heads"]
    assert toy["num_experts_per_tok"] // toy["topk_group"] == 2  # of each chosen group, as in the published model
    assert toy["first_k_dense_replace"] == 3 < toy["num_hidden_layers"]
    assert toy["num_nextn_predict_layers"] == 1
    assert toy["rope_scaling"] == DEEPSEEK_V3["rope_scaling"]
    toy = shrink(LLAMA)
    assert toy["num_attention_heads"] == 4 * toy["num_key_value_heads"] == 8
    assert toy["eos_token_id"] == [129, 128]
    assert toy["bos_token_id"] == 130
    assert toy["unsloth_version"] == LLAMA["unsloth_version"]
    widths = [toy["hidden_size"], toy["intermediate_size"], toy["vocab_size"], toy["num_attention_heads"]]
    assert len(set(widths)) == len(widths)


@given(
    heads=st.sampled_from([1, 2, 7, 9, 14, 16, 28, 32, 40, 56, 64, 71, 128]),
    divisor=st.integers(1, 128),
    layers=st.integers(1, 130),
    wide=st.sampled_from([None, 64, 128, 256]),
)
def test_any_heads_and_layers_become_a_toy_of_the_same_kind(heads, divisor, layers, wide):
    """One group stays one, as many as heads stay as many, some stay some; a relation that cannot be kept is an error."""
    groups = max(1, heads // divisor)
    config = {**LLAMA, "num_attention_heads": heads, "num_key_value_heads": groups, "num_hidden_layers": layers}
    config |= {"hidden_size": heads * 64} | ({"head_dim": wide} if wide else {})
    if heads % groups:
        with pytest.raises(ShrinkError, match="no multiple"):
            shrink(config)
        return
    toy = shrink(config)
    kind = lambda h, g: (g == h, g == 1, (h // g) % 2)  # noqa: E731
    small = kind(toy["num_attention_heads"], toy["num_key_value_heads"])
    assert small[0] == (heads == groups)
    assert heads == groups or small[1] == (groups == 1)
    assert toy["num_hidden_layers"] % 4 == 0
    assert toy["num_hidden_layers"] >= 8
    if wide:
        before, after = (
            heads * wide - config["hidden_size"],
            toy["num_attention_heads"] * toy["head_dim"] - toy["hidden_size"],
        )
        assert (before > 0) == (after > 0)
        assert (before < 0) == (after < 0)
    assert not unshrunk(toy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": None}, "config has no num_hidden_layers"),
        ({"num_key_value_heads": 5}, "num_attention_heads = 32 is no multiple of num_key_value_heads = 5"),
    ],
)
def test_a_relation_that_a_toy_cannot_keep_is_named(change, message):
    with pytest.raises(ShrinkError, match=message):
        shrink({**LLAMA, **change})


def test_a_target_may_be_a_file_or_a_folder_and_is_kept_as_a_row(tmp_path):
    """config.json, its folder, and --save-row: the kept row and golden are what verify used."""
    (tmp_path / "Mine-7B").mkdir()
    file = tmp_path / "Mine-7B" / "config.json"
    file.write_text(json.dumps(LLAMA))
    by_file, by_folder = targets.resolve(str(file)), targets.resolve(file.parent)
    assert by_file.row == by_folder.row == "Mine-7B"
    assert by_file.toy == by_folder.toy
    with targets.as_rows([by_file]) as [row]:
        targets.save_row(by_file, tmp_path / "kept", goldens.to_bytes(goldens.live(row)))
        assert toy_models.is_guest(row)
    assert not toy_models.is_guest("Mine-7B")
    assert json.loads((tmp_path / "kept" / "rows" / "Mine-7B.json").read_text()) == by_file.toy
    assert (tmp_path / "kept" / "goldens" / "Mine-7B.safetensors").stat().st_size < 1 << 20


@pytest.mark.parametrize(
    ("target", "message"), [("lama3", "nearest: llama3"), ("no/such/folder/config.json", "neither a row")]
)
def test_a_target_that_is_nothing_says_so(target, message):
    with pytest.raises(ValueError, match=message):
        targets.resolve(target)


def test_guests_leave_no_trace_and_take_no_rows_name():
    with pytest.raises(ValueError, match="a row named llama3 already"), toy_models.guests({"llama3": LLAMA}):
        pass
    with toy_models.guests({"stranger": LLAMA}):
        assert toy_models.config_dict("stranger")["hidden_size"] == 4096
    with pytest.raises(ValueError, match="no toy row 'stranger'"):
        toy_models.config_dict("stranger")


def test_the_sample_has_every_mechanism_and_is_small():
    rows = toy_models.rows()
    chosen = sample(rows)
    every = {name for row in rows for name in mechanisms(provider_of(row))}
    assert {name for row in chosen for name in mechanisms(provider_of(row))} == every
    assert len(chosen) < len(rows) / 3


def test_a_head_dim_stated_or_not_means_the_same_and_another_does_not():
    config = {"hidden_size": 64, "num_attention_heads": 4}
    assert meant("head_dim", None, config) == 16 == meant("head_dim", 16, config)
    assert meant("head_dim", 32, config) == 32
    assert meant("sliding_window_pattern", "LG", {**config, "sliding_window": 8}) == "LG"
