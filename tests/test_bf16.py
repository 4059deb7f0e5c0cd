"""The check `bf16`: how far a model in bf16 may be from the fp32 golden, and what must be too far."""

import numpy as np
import pytest
import torch

import toy_models
from bridges.config_rules import ROPE, Rule
from bridges.conversion.mapping import AutoMapping, MegatronMappingRegistry
from bridges.families.llama import LlamaBridge
from bridges.families.qwen3 import Qwen3MoeBridge
from harness.checks.bf16 import NO_KERNEL, hf_choices, judge, otherwise, token_errors
from harness.ranks import jobs
from harness.sweep import verify

NONE = np.zeros((2, 16), bool)


def errors(scale: float) -> np.ndarray:
    return scale * np.linspace(0.5, 1.5, 32).reshape(2, 16)


def some(count: int) -> np.ndarray:
    return (np.arange(32) < count).reshape(2, 16)


def test_the_same_noise_passes_and_three_times_the_noise_fails():
    assert judge(errors(1e-2), errors(1e-2), NONE, NONE).value == pytest.approx(1)
    assert judge(errors(1e-2), errors(1e-2), NONE, NONE).ok
    worse = judge(errors(3e-2), errors(1e-2), NONE, NONE)
    assert not worse.ok
    assert "median token off by 0.03, Hugging Face in bf16 by 0.01" in worse.detail


def test_not_a_number_fails():
    assert not judge(errors(np.nan), errors(1e-2), NONE, NONE).ok


def test_tokens_routed_otherwise_are_left_out_counted_and_limited():
    """A few wild tokens that were routed otherwise do no harm; many of them do, and so does nothing left to compare."""
    wild = errors(1e-2)
    wild[some(4)] = 1.0
    kept = judge(wild, errors(1e-2), some(4), some(2))
    assert kept.ok
    assert "4 of 32 tokens routed otherwise than in fp32 (Hugging Face in bf16: 2)" in kept.detail
    assert not judge(errors(1e-2), errors(1e-2), some(7), some(2)).ok
    assert "too few tokens" in judge(errors(1e-2), errors(1e-2), some(30), some(30)).detail


def test_errors_and_choices_by_hand():
    expected = np.array([[[3.0, 4.0], [0.0, 1.0]]])
    assert token_errors(expected + np.array([[[0.0, 0.5], [0.0, 0.0]]]), expected).tolist() == [[0.1, 0.0]]
    chosen = {"layers.1.router": np.array([[[1, 0], [0, 1]]])}
    assert otherwise({"layers.1.router": np.array([[[1, 0], [1, 0]]])}, chosen, (1, 2)).tolist() == [[False, True]]
    assert otherwise({}, {}, (1, 2)).tolist() == [[False, False]]
    with pytest.raises(ValueError, match="routers of"):
        otherwise({}, chosen, (1, 2))


@pytest.mark.parametrize("row", ["mixtral", "deepseek_v3", "ernie4_5_moe"])
def test_choices_of_hugging_face_are_topk_in_every_layer_with_experts(row):
    config = toy_models.config_dict(row)
    topk = config.get("num_experts_per_tok") or config["moe_k"]
    _, found = hf_choices(toy_models.build(row), toy_models.inputs(row))
    assert len(found) >= 4
    assert all((chosen.sum(-1) == topk).all() for chosen in found.values())


def test_no_kernel_is_a_reason_to_skip_and_another_error_is_not(monkeypatch):
    """Transformer Engine says so by raising ValueError on every rank."""

    def refuse(words):
        def raising(ids):
            raise ValueError(words)

        monkeypatch.setattr(jobs, "forward", raising)

    refuse(f"{NO_KERNEL} is available for the provided inputs.\nMore lines")
    report = verify("llama3", layouts=["tp1"], checks=["bf16", "complete"])
    skipped, passed = report.cells
    assert (skipped.status, passed.status) == ("skip", "pass")
    assert skipped.detail.endswith(f"in this layout: {NO_KERNEL} is available for the provided inputs.")
    refuse("something else")
    [failed] = verify("llama3", layouts=["tp1"], checks=["bf16"]).cells
    assert failed.status == "error"


# Wrong bridges


class NoTheta(LlamaBridge):
    """Rope's base is forgotten."""

    CONFIG_RULES = (Rule(ROPE.hf, lambda c: {"rotary_base": 10000.0}, ROPE.to_hf),)


class SwappedNorms(Qwen3MoeBridge):
    """The norms before attention and before the experts change places, both ways."""

    def mapping_registry(self):
        layer, hf = "decoder.layers.*", "model.layers.*"
        return MegatronMappingRegistry(
            AutoMapping(
                f"{layer}.self_attention.linear_qkv.layer_norm_weight", f"{hf}.post_attention_layernorm.weight"
            ),
            AutoMapping(f"{layer}.pre_mlp_layernorm.weight", f"{hf}.input_layernorm.weight"),
            *super().mapping_registry(),
        )


@pytest.mark.parametrize(("row", "bridge"), [("llama3", NoTheta), ("qwen3_moe", SwappedNorms)])
def test_a_wrong_bridge_is_outside_the_noise(row, bridge):
    report = verify(row, bridge=bridge, layouts=["tp1"], checks=["bf16"])
    assert report.cells[0].status == "fail", report.cells[0].detail


def test_the_model_is_in_fp32_again_afterwards():
    """The other checks of the cell are about fp32."""
    report = verify("qwen3_moe", layouts=["tp1"], checks=["bf16", "logits", "roundtrip"])
    assert report.summary()["pass"] == 3, [cell.detail for cell in report.cells]
    assert torch.get_default_dtype() == torch.float32
