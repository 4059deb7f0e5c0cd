"""Multi-token prediction: the reference, the mappings of the heads, and wrong bridges that must fail."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpModel

import toy_models
from bridges import AutoBridge, MegatronMappingRegistry
from bridges.conversion.mapping import AutoMapping, Part
from bridges.families.deepseek import DeepseekV3Bridge
from bridges.families.mimo import MiMoBridge
from bridges.mechanisms import mtp
from harness.reference import goldens
from harness.sweep import verify
from tests.bounds import assert_apart, assert_same, of_row

ROW = "deepseek_v3"


def failed(report):
    return {cell.check: cell.detail for cell in report.cells if cell.status in ("fail", "error")}


# The reference


def test_transformers_loads_the_published_heads_itself(tmp_path):
    """The names that we write are those that transformers' own loader of heads reads; it gives the golden's logits."""
    folder = toy_models.write(ROW, tmp_path / "model")
    main = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", experts_implementation="eager")
    main._keys_to_ignore_on_load_unexpected = [r"model\.layers\.8.*"]  # transformers knows the published 61 alone
    heads = MtpModel.from_pretrained(main).eval()
    with torch.no_grad():
        found = toy_models.mtp.logits(heads, main, toy_models.inputs(ROW))
    golden = goldens.load(ROW)
    assert len(found) == len(golden.mtp_logits) == 1
    assert_same(found[0], golden.mtp_logits[0], of_row(ROW))  # experts lie in another order; so may sums


def test_a_head_has_seen_the_tokens_that_it_says():
    """Head k at position i depends on the tokens up to i + k and on no later one."""
    row = "mimo_7b_tied"
    model = toy_models.build(row)
    ids = toy_models.inputs(row)
    changed = ids.clone()
    changed[:, 12] = (ids[:, 12] + 1) % 131
    with torch.no_grad():
        before, after = (toy_models.mtp.logits(model.mtp, model, one) for one in (ids, changed))
    for k, (one, other) in enumerate(zip(before, after, strict=True), start=1):
        same = (one == other).all(dim=(0, 2))
        assert same.tolist() == [True] * (12 - k) + [False] * (len(same) - 12 + k), k


def test_every_head_is_in_the_golden_and_differs():
    golden = goldens.load("mimo_7b_tied")
    assert [tuple(one.shape) for one in golden.mtp_logits] == [(4, 23, 131), (4, 22, 131)]
    assert_apart(golden.mtp_logits[0][:, :22], golden.mtp_logits[1])


# Mappings


def test_both_names_of_the_block_mean_the_same():
    """Megatron renamed the decoder layer of a head: `transformer_layer` became `mtp_model_layer`."""
    registry = AutoBridge.from_hf_config(toy_models.hf_config(ROW)).mapping_registry()
    for tail in ("self_attention.linear_q_up_proj.weight", "mlp.experts.linear_fc1.weight3", "mlp.router.expert_bias"):
        new, old = (registry.megatron_to_hf_lookup(f"mtp.layers.0.{name}.{tail}")[1] for name in mtp.BLOCK_NAMES)
        assert new == old
        assert all(part.hf.startswith("model.layers.8.") for part in new)


def test_a_config_without_heads_has_no_mappings_of_heads():
    config = toy_models.hf_config(ROW)
    config.num_nextn_predict_layers = 0
    bridge = AutoBridge.from_hf_config(config)
    assert not [m for m in bridge.mapping_registry() if m.megatron_param.startswith("mtp.")]
    assert bridge.to_megatron_provider().mtp_num_layers is None


@pytest.mark.parametrize("row", ["deepseek_v3", "mimo_7b", "mimo_7b_tied"])
@pytest.mark.parametrize("layout", ["pp2-split8.0", "pp2-vpp2-split3.3.2.0", "tp2-pp2-split8.0-sp"])
def test_heads_on_a_stage_of_their_own(row, layout):
    """The last stage holds the heads and no decoder layer; the final norm stays with the last decoder layer."""
    report = verify(row, layouts=[layout], checks=["complete", "roundtrip", "logits"])
    assert report.summary()["pass"] == 3, failed(report)


# Wrong checkpoints


def edit(folder, name, change):
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name] = change(tensors[name])
            save_file(tensors, file, {"format": "pt"})
            return
    raise AssertionError(f"{name} is not there")


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("model.layers.8.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.layers.8.shared_head.head.weight", "lm_head.weight"),
    ],
)
def test_a_copy_that_differs_from_its_original_is_refused(name, source, tmp_path):
    """Megatron holds one of them; the other's values would be lost silently."""
    folder = toy_models.write(ROW, tmp_path / "model")
    edit(folder, name, lambda tensor: tensor * 1.5)
    report = verify(ROW, folder=folder, layouts=["tp1"], checks=["complete"])
    assert f"{name} differs from {source}" in failed(report)["complete"]


# Wrong bridges


def moved(old: str, new: str):
    """DeepSeek-V3 whose heads read `new` for the Hugging Face prefix `old`."""

    class Mutant(DeepseekV3Bridge):
        def mapping_registry(self):
            registry = super().mapping_registry()
            for mapping in registry.mappings:
                if mapping.megatron_param.startswith("mtp."):
                    mapping.parts = tuple(Part(p.hf.replace(old, new), p.view) for p in mapping.parts)
            return MegatronMappingRegistry(*registry.mappings)

    return Mutant


def test_heads_mapped_onto_layer_0_leave_tensors_unread():
    report = verify(ROW, bridge=moved("model.layers.8.", "model.layers.1."), layouts=["tp1"], checks=["complete"])
    assert "the checkpoint has no tensor of them" in failed(report)["complete"]


def test_one_head_tensor_mapped_onto_layer_1_is_named():
    bridge = moved("model.layers.8.enorm.", "model.layers.1.enorm.")
    report = verify(ROW, bridge=bridge, layouts=["tp1"], checks=["complete"])
    assert "model.layers.1.enorm.weight is missing" in failed(report)["complete"]


def test_a_block_that_changes_places_with_a_decoder_layer_is_seen():
    """The head runs layer 7's weights and layer 7 the head's: every byte comes back, and every logit is another."""

    class Mutant(DeepseekV3Bridge):
        def mapping_registry(self):
            registry = super().mapping_registry()
            inner = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
            block = re.compile(rf"model\.layers\.8\.(?={'|'.join(inner)})")
            swapped = []
            for m in registry.mappings:
                if m.megatron_param.startswith("mtp."):
                    m.parts = tuple(Part(block.sub("model.layers.7.", p.hf), p.view) for p in m.parts)
                elif ".layers.*." in m.megatron_param:
                    one = type(m).__new__(type(m))
                    one.__dict__.update(m.__dict__)
                    one.megatron_param = m.megatron_param.replace("*", "7", 1)
                    one.parts = tuple(Part(p.hf.replace("*", "8", 1), p.view) for p in m.parts)
                    swapped.append(one)
            return MegatronMappingRegistry(*swapped, *registry.mappings)

    report = verify(ROW, bridge=Mutant, layouts=["tp1"], checks=["complete", "roundtrip", "logits"])
    assert set(failed(report)) == {"logits"}


def test_halves_of_the_projection_swapped_both_ways_are_seen():
    """Embedding and hidden state change places on import and on export: only the head's logits and gradients tell."""

    class Mutant(MiMoBridge):
        def mapping_registry(self):
            registry = super().mapping_registry()
            straight = AutoMapping("mtp.layers.0.eh_proj.weight", "model.mtp_layers.0.input_proj.weight")
            kept = [m for m in registry.mappings if m.megatron_param != straight.megatron_param]
            return MegatronMappingRegistry(*kept, straight)

    checks = ["complete", "roundtrip", "logits", "reload", "grads"]
    report = verify("mimo_7b", bridge=Mutant, layouts=["tp2"], checks=checks)
    assert set(failed(report)) == {"logits", "grads"}
    assert failed(report)["logits"].startswith("multi-token prediction head 1")


def test_the_golden_of_a_head_is_compared(monkeypatch):
    golden = goldens.load("mimo_7b_tied")
    wrong = goldens.Golden(golden.row, {**golden.tensors}, golden.provenance)
    wrong.tensors["mtp_logits_2"] = golden.tensors["mtp_logits_2"] * 1.001
    monkeypatch.setattr(goldens, "load", lambda row: wrong)
    report = verify("mimo_7b_tied", layouts=["tp1"], checks=["logits"])
    assert failed(report)["logits"].startswith("multi-token prediction head 2")
