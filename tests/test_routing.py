"""The choice of experts where the model's rule is not Megatron's, and configs of models that transformers does not have."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter
from transformers import CONFIG_MAPPING, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter

import toy_models
from bridges import AutoBridge, ConfigError, GPTModelProvider, PreTrainedCausalLM
from bridges.hf_pretrained import PublishedConfig, load_config
from bridges.providers import routing
from tests.bounds import assert_apart, assert_same

E, H, TOKENS = 16, 8, 257


def megatron_choice(
    logits, *, topk, bias=None, scores="softmax", pre_softmax=True, groups=None, chosen=None, best=None
):
    """(probabilities, map) [tokens, experts] of Megatron's own function with a Choice in it."""
    config = SimpleNamespace(
        moe_router_score_function=scores, moe_router_pre_softmax=pre_softmax, moe_router_group_best=best
    )
    router = SimpleNamespace(config=config, expert_bias=bias)
    return topk_routing_with_score_function(
        logits,
        topk,
        use_pre_softmax=pre_softmax,
        num_groups=groups,
        group_topk=chosen,
        score_function=scores,
        expert_bias=bias,
        router_replay=routing.Choice(router) if best or scores == "softmax" else None,  # type: ignore[arg-type]
    )


def hf_choice(router, weight, hidden):
    with torch.no_grad():
        router.weight.copy_(weight)
        logits, weights, experts = router(hidden)
    probabilities = torch.zeros_like(logits).scatter(1, experts, weights)
    return logits, probabilities


@pytest.fixture
def numbers():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator) for shape in ((E, H), (TOKENS, H), (E,)))


@pytest.mark.parametrize(("topk", "chosen"), [(4, 2), (6, 3), (3, 2), (3, 3), (4, 1)])
def test_groups_are_scored_by_their_best_expert_as_in_deepseek_v2(numbers, topk, chosen):
    """Also with the published model's six experts of three groups."""
    weight, hidden, _ = numbers
    config = SimpleNamespace(
        num_experts_per_tok=topk,
        num_experts=E,
        hidden_size=H,
        routed_scaling_factor=1.0,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=chosen,
    )
    logits, expected = hf_choice(DeepseekV2TopkRouter(config), weight, hidden)  # type: ignore[arg-type]
    found, chosen_experts = megatron_choice(logits, topk=topk, groups=4, chosen=chosen, best=1)
    assert_same(found, expected)
    assert (chosen_experts.sum(-1) == topk).all()
    if chosen > 1:
        other, _ = megatron_choice(logits, topk=topk, groups=4, chosen=chosen, best=2)
        assert_apart(other, expected)


@pytest.mark.parametrize(("topk", "chosen"), [(6, 2), (3, 2), (4, 1)])
def test_groups_are_scored_by_their_best_two_as_in_deepseek_v3(numbers, topk, chosen):
    """Whatever the ratio of experts to groups; Megatron's own formula differs where that is not two."""
    weight, hidden, bias = numbers
    config = SimpleNamespace(
        num_experts_per_tok=topk,
        num_local_experts=E,
        hidden_size=H,
        n_group=4,
        topk_group=chosen,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
    )
    router = DeepseekV3TopkRouter(config)  # type: ignore[arg-type]
    router.e_score_correction_bias.copy_(bias)
    logits, expected = hf_choice(router, weight, hidden)
    how = {"topk": topk, "bias": bias, "scores": "sigmoid", "pre_softmax": False, "groups": 4, "chosen": chosen}
    assert_same(megatron_choice(logits, **how, best=2)[0], expected)
    assert_apart(megatron_choice(logits, **how)[0], expected)


def test_a_bias_chooses_among_softmax_scores_and_does_not_weigh(numbers):
    weight, hidden, bias = numbers
    config = SimpleNamespace(num_experts=E, hidden_size=H, num_experts_per_tok=3, moe_norm_min=1e-12)
    router = Ernie4_5_MoeTopKRouter(config)
    with torch.no_grad():
        router.moe_statics.e_score_correction_bias.copy_(bias[None] / 10)
    logits, expected = hf_choice(router, weight, hidden)
    assert_same(megatron_choice(logits, topk=3, bias=bias / 10, pre_softmax=False)[0], expected)
    assert_apart(megatron_choice(logits, topk=3, pre_softmax=False)[0], expected)


@pytest.mark.parametrize("row", ["qwen3_moe", "moonlight", "bailing_moe_v2"])
def test_models_with_megatron_s_own_rule_have_no_choice_of_ours(row):
    config = load_config(toy_models.config_dict(row), Path(row), trusted=False)
    provider = AutoBridge.from_hf_config(config).to_megatron_provider()
    assert not routing.own_choice(provider)
    router = TopKRouter.__new__(TopKRouter)
    torch.nn.Module.__init__(router)
    router.router_replay = None
    routing.install(torch.nn.Sequential(router), provider)
    assert router.router_replay is None
    provider.moe_router_group_best = 1
    routing.install(torch.nn.Sequential(router), provider)
    assert isinstance(router.router_replay, routing.Choice)


@pytest.mark.parametrize("name", ["moe_router_fusion", "moe_enable_routing_replay"])
def test_settings_that_would_bypass_the_choice_are_refused(name):
    provider = GPTModelProvider(
        num_layers=1, hidden_size=8, num_attention_heads=1, num_moe_experts=4, moe_router_group_best=1
    )
    setattr(provider, name, True)
    with pytest.raises(ValueError, match=f"{name} = True: this model's choice of experts is not Megatron's"):
        provider.finalize()


def test_a_bias_on_softmax_scores_passes_megatron_s_validation_and_stays():
    config = load_config(toy_models.config_dict("ernie4_5_moe"), Path("x"), trusted=False)
    provider = AutoBridge.from_hf_config(config).to_megatron_provider()
    assert provider.finalize().moe_router_enable_expert_bias
    assert provider.finalize().moe_router_score_function == "softmax"


# -- configs ---------------------------------------------------------------------------------------------------------


def provider_of(raw: dict):
    return AutoBridge(PreTrainedCausalLM(load_config(raw, Path("model"), trusted=False), raw)).to_megatron_provider()


def test_the_published_deepseek_v2_is_accepted():
    """Six experts of three of eight groups, yarn; fields as in deepseek-ai/DeepSeek-V2's config.json."""
    raw = {
        **toy_models.config_dict("deepseek_v2_topk4"),
        **{"n_routed_experts": 160, "num_experts_per_tok": 6, "n_group": 8, "topk_group": 3, "moe_layer_freq": 1},
        **{"auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"}, "ep_size": 1, "seq_aux": True},
    }
    provider = provider_of(raw)
    assert (provider.moe_router_num_groups, provider.moe_router_group_topk, provider.moe_router_group_best) == (8, 3, 1)


@pytest.mark.parametrize(
    ("row", "fields", "says"),
    [
        ("deepseek_v2_topk4", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not built"),
        ("deepseek_v2_topk4", {"n_group": None}, "group_limited_greedy without n_group"),
        ("qwen3_5_moe_text", {"attention_bias": True}, "computes only attention_bias = False"),
        (
            "deepseek_v3",
            {"attention_bias": True, "rope_interleave": False},
            "attention_bias = True: .*rope_interleave = F",
        ),
        ("bailing_moe_v2", {"n_group": ...}, "config field n_group is missing: only the model's own code knows"),
        ("bailing_moe_v2", {"partial_rotary_factor": ...}, "config field partial_rotary_factor is missing"),
        ("bailing_moe_v2", {"moe_shared_expert_intermediate_size": 48}, "48 is not built: only moe_intermediate_size"),
        ("bailing_moe_v2", {"norm_head": True}, "computes only norm_head = False"),
        ("sarvam_mla", {"rope_scaling": None}, "rope_scaling is missing: only the model's own code"),
        ("sarvam_mla", {"topk_group": ...}, "config field topk_group is missing"),
    ],
)
def test_what_a_config_does_not_say_is_not_guessed(row, fields, says):
    raw = {**toy_models.config_dict(row), **fields}
    raw = {name: value for name, value in raw.items() if value is not ...}
    with pytest.raises(ValueError, match=says):
        provider_of(raw)


def test_irregular_layers_with_experts_have_no_config():
    raw = toy_models.config_dict("ernie4_5_moe")
    bridge = AutoBridge(PreTrainedCausalLM(load_config(raw, Path("model"), trusted=False), raw))
    provider = bridge.to_megatron_provider()
    provider.moe_layer_freq = [0, 1, 1, 0, 1, 0, 0, 1]
    with pytest.raises(ValueError, match=r"layers with experts \[1, 2, 4, 7\]"):
        bridge.megatron_to_hf_config(provider)


@pytest.mark.parametrize("row", ["kimi_k2", "bailing_moe_v2", "sarvam_moe", "sarvam_mla"])
def test_a_model_type_that_only_a_bridge_knows_is_read_without_its_code(tmp_path, row):
    """From the folder as published, which names code of its own (auto_map) that is not even there."""
    raw = toy_models.config_dict(row)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    opened = PreTrainedCausalLM.open(tmp_path, trust_remote_code=False)
    assert type(opened.config) is (DeepseekV3Config if row == "kimi_k2" else PublishedConfig)
    assert opened.raw == raw
    assert opened.config.rope_parameters["rope_theta"] == raw["rope_theta"]
    assert AutoBridge.from_hf_pretrained(tmp_path).to_megatron_provider(load_weights=False).num_moe_experts


def test_the_published_name_of_bailing_is_an_alias():
    """Ling-mini-2.0's config.json says bailing_moe, which an older architecture says as well."""
    raw = {**toy_models.config_dict("bailing_moe_v2"), "model_type": "bailing_moe"}
    assert provider_of(raw).moe_router_num_groups == 4
    with pytest.raises(ConfigError, match=r"architecture BailingMoeForCausalLM has no bridge \(goldengate families"):
        provider_of({**raw, "architectures": ["BailingMoeForCausalLM"]})


@pytest.mark.parametrize("fields", [{"architectures": ["LlamaForCausalLM"]}, {"model_type": "kimi_k3"}])
def test_another_architecture_or_model_type_still_needs_permission(fields):
    raw = {**copy.deepcopy(toy_models.config_dict("kimi_k2")), **fields}
    with pytest.raises(ConfigError, match="ships its own code"):
        load_config(raw, Path("model"), trusted=False)


@pytest.mark.parametrize("row", ["bailing_moe_v2", "sarvam_moe", "sarvam_mla"])
def test_fault_J_a_model_type_that_transformers_gains_changes_nothing(row, monkeypatch):
    """Not how config.json is read, though the new class calls a field otherwise and has defaults for those it lacks; not the
    provider; not the config.json that is written."""
    raw = toy_models.config_dict(row)

    def read():
        bridge = AutoBridge(PreTrainedCausalLM(load_config(raw, Path("model"), trusted=False), raw))
        provider = bridge.to_megatron_provider()
        return (
            type(bridge.hf_pretrained.config),
            provider,
            bridge.transformer_config,
            bridge.megatron_to_hf_config(provider),
        )

    class Gained(DeepseekV3Config):
        model_type = row
        attribute_map = {"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"}

    before = read()
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, row, Gained)
    assert CONFIG_MAPPING[row] is Gained
    kind, provider, config, written = read()
    assert kind is before[0] is PublishedConfig
    differ = {name for name, value in vars(provider).items() if value != vars(before[1])[name]}
    assert differ <= {"weight_loader"}
    assert type(config) is type(before[2])
    assert written == before[3]
