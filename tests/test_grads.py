"""The check `grads`: Megatron's finalised gradients under Hugging Face names, and what it must catch."""

import importlib
import json

import numpy as np
import pytest
import torch
from megatron.core.distributed import DistributedDataParallel
from safetensors.torch import save_file

import toy_models
from bridges import Layout
from bridges.conversion.mapping import MegatronMappingRegistry, QKVMapping
from bridges.conversion.views import Box
from bridges.families.llama import LlamaBridge
from bridges.providers import cpu_backend
from harness.checks import grads
from harness.ranks import jobs, training
from harness.ranks.pool import RankError
from harness.reference import goldens
from harness.reference.gradients import compare_fingerprints, cotangents, fingerprints, hf_gradients
from harness.sweep import verify, verify_rows
from tests import bounds

Q, K = "model.layers.*.self_attn.q_proj.weight", "model.layers.*.self_attn.k_proj.weight"
V = "model.layers.*.self_attn.v_proj.weight"
QKV = "decoder.layers.*.self_attention.linear_qkv.weight"


class SwappedKV(LlamaBridge):
    """Keys and values exchanged, on import and on export."""

    def mapping_registry(self):
        return MegatronMappingRegistry(QKVMapping(QKV, q=Q, k=V, v=K), *super().mapping_registry())


# What is right


def test_gradients_agree_in_parallel_layouts():
    """Dense and tied, with sequence parallel, virtual stages and context parallel: every parameter's gradient."""
    report = verify_rows(["llama3.2_tied"], which=["tp1", "tp2-sp", "pp4-vpp2", "cp2"], checks=["grads"])
    assert report.summary()["pass"] == 4, [c.detail for c in report.cells]
    assert all(c.value is not None and c.value < bounds.of_gradients("llama3.2_tied") for c in report.cells)
    assert "74 gradients" in report.cells[0].detail


@pytest.mark.parametrize("layout", ["ep2", "ep2-dp4", "tp2-pp2-vpp2-ep2-etp1-cp2-sp"])
def test_gradients_of_experts_agree_under_expert_parallel(layout):
    """Tokens come from other data-parallel replicas; the expert data-parallel reduction puts their gradients together."""
    report = verify("qwen3_moe", layouts=[layout], checks=["grads"])
    assert report.ok, report.cells[0].detail
    assert "267 gradients" in report.cells[0].detail


def test_what_has_no_gradient_is_listed():
    """The bias that chooses experts gets none by nature, experts that no token chose get zero: both are said."""
    report = verify("dots1", layouts=["tp1"], checks=["grads"])
    assert report.ok, report.cells[0].detail
    assert "are zero (experts that no token chose)" in report.cells[0].detail
    assert "without gradient by nature: model.layers.1.mlp.gate.e_score_correction_bias" in report.cells[0].detail


def test_the_untouched_bridge_passes_the_same_path():
    """What the mutants below fail is not the path."""
    assert verify("llama3", bridge=LlamaBridge, layouts=["tp1"], checks=["grads"]).ok


def train_forward(inputs):
    """On a rank: a forward as in training."""
    for chunk in jobs.current().chunks:
        chunk.train()
    jobs.forward(inputs)


def test_experts_under_tensor_parallelism_without_sequence_parallelism_are_skipped(ranks, tmp_path):
    """Because Megatron refuses to train so: the skip falls with the refusal."""
    cell = verify("mixtral", layouts=["tp2"], checks=["grads"]).cells[0]
    assert cell.status == "skip"
    assert "Megatron-Core refuses to train experts" in cell.detail

    layout = Layout(tp=2)
    ranks.use_for(layout)
    ranks.run(2, jobs.build, str(toy_models.write("mixtral", tmp_path / "hf")), layout)
    with pytest.raises(RankError, match="without also enabling sequence parallelism"):
        ranks.run(2, train_forward, toy_models.inputs("mixtral").numpy())


# What is wrong


def failing(row, layout, **options):
    """The one cell, which fails and is no error."""
    (cell,) = verify(row, layouts=[layout], checks=["grads"], **options).cells
    assert cell.status == "fail", cell
    return cell


def test_swapped_tensors_have_other_gradients():
    """k and v swapped both ways keeps the bytes; the gradients are other tensors'."""
    cell = failing("llama3", "tp1", bridge=SwappedKV)
    assert "gradient of model.layers.0" in cell.detail
    assert cell.value > 0.1


def test_a_norm_that_is_not_reduced_under_sequence_parallel_fails(monkeypatch):
    """Megatron sums a replicated norm's gradient over tensor parallel only when the parameter says so."""
    original = cpu_backend._norm_parameter

    def silent(config, size):
        parameter = original(config, size)
        parameter.sequence_parallel = False
        return parameter

    monkeypatch.setattr(cpu_backend, "_norm_parameter", silent)
    assert "norm.weight is off by" in failing("llama3", "tp2-sp").detail


def test_an_expert_that_is_not_reduced_over_expert_data_parallel_fails(monkeypatch):
    """Two ranks hold the same experts and see other tokens; without the reduction one sees half of them."""

    def dense_only(self, force_all_reduce=False):
        for group in self.bucket_groups:
            group.finish_grad_sync(force_all_reduce=force_all_reduce)

    monkeypatch.setattr(DistributedDataParallel, "finish_grad_sync", dense_only)
    cell = failing("qwen3_moe", "ep2-dp4")
    assert "gradient of model.layers.0.mlp.experts." in cell.detail
    assert "self_attn" not in cell.detail


def test_an_expert_that_is_reduced_like_a_dense_layer_fails(monkeypatch):
    """A parameter that does not say it is an expert's is summed over ranks that hold other experts."""
    original = cpu_backend.GroupedLinear.__init__

    def unmarked(self, *args, **options):
        original(self, *args, **options)
        for parameter in self.parameters():
            parameter.allreduce = True

    monkeypatch.setattr(cpu_backend.GroupedLinear, "__init__", unmarked)
    assert "gradient of model.layers.0.mlp.experts." in failing("qwen3_moe", "ep2").detail


def test_a_tied_embedding_that_is_not_summed_over_stages_fails(monkeypatch):
    """Its gradient as a head arises on the last stage, as an embedding on the first."""
    finalize = importlib.import_module(
        "megatron.core.distributed.finalize_model_grads"
    )  # there is a function of that name
    monkeypatch.setattr(finalize, "_allreduce_word_embedding_grads", lambda *args, **options: None)
    detail = failing("llama3.2_tied", "pp2").detail
    assert detail.startswith("gradient of model.embed_tokens.weight is off by ")
    assert ";" not in detail, "no other tensor"


def test_a_gradient_multiplied_by_cp_fails(monkeypatch):
    """As when the loss is scaled for context parallelism once more than the schedule does."""
    original = training.finalize_model_grads

    def scaled(model, *args, **options):
        original(model, *args, **options)
        for chunk in model:
            chunk.scale_gradients(2.0)

    monkeypatch.setattr(training, "finalize_model_grads", scaled)
    cell = failing("llama3", "cp2")
    assert cell.value == pytest.approx(1.0, abs=bounds.of_gradients("llama3"))
    assert "lm_head.weight is off by 1" in cell.detail


def test_a_frozen_parameter_fails(monkeypatch):
    """Megatron has no gradient where Hugging Face has one: that is not by nature."""
    original = cpu_backend._norm_parameter
    frozen = lambda config, size: original(config, size).requires_grad_(False)  # noqa: E731
    monkeypatch.setattr(cpu_backend, "_norm_parameter", frozen)
    assert "norm.weight has a gradient only in Hugging Face" in failing("llama3", "tp1").detail


def test_an_altered_fingerprint_fails(monkeypatch, tmp_path):
    """The golden is the evidence: when one of its numbers is not what autograd gives, the tensor is named."""
    golden = goldens.load("llama3")
    altered = golden.tensors["gradients"].clone()
    altered[1, 2] += 1e-3 * altered[1, 0]
    names = sorted(hf_names("llama3"))
    tensors = golden.tensors | {"gradients": altered}
    content = golden.provenance | {"tensors_hash": toy_models.weights_hash(tensors)}
    monkeypatch.setattr(goldens, "FOLDER", tmp_path)
    save_file(tensors, goldens.path("llama3"), {"provenance": json.dumps(content)})
    detail = failing("llama3", "tp1").detail
    assert detail == f"Hugging Face's gradient of {names[1]} is off from the golden's fingerprint by 0.0005"


def hf_names(row):
    return hf_gradients(row, toy_models.build(row), toy_models.inputs(row), cotangents(row, [torch.empty(4, 24, 131)]))


# Its parts


def test_fingerprints_estimate_the_relative_rms():
    """Their root mean square difference is about the difference's norm; it is exact on average."""
    random = torch.Generator().manual_seed(0)
    gradients = {f"t{i}": torch.randn(8, 16, generator=random) for i in range(200)}
    other = {name: g + 1e-2 * torch.randn(8, 16, generator=random) for name, g in gradients.items()}
    before, after = fingerprints(gradients), fingerprints(other)
    estimate = ((after - before)[:, 1:].square().mean() / before[:, 0].square().mean()).sqrt()
    # The root of the mean of 800 squares of normal numbers: its standard deviation is 1 / sqrt(2 * 800), 2.5 %.
    assert estimate.item() == pytest.approx(1e-2, rel=6 * 0.025)
    assert compare_fingerprints(gradients, before, 1e-6) == []
    assert len(compare_fingerprints(other, before, 1e-3)) > 190
    assert "fingerprints [199, 5]" in compare_fingerprints(gradients, before[1:], 1.0)[0]


def test_a_gradient_that_appears_where_the_golden_has_none_fails():
    """Nothing is divided by zero and nothing passes for it."""
    none, some = {"a": torch.zeros(3)}, {"a": torch.ones(3)}
    assert compare_fingerprints(none, fingerprints(none), 1e-4) == []
    assert "gradient of a" in compare_fingerprints(some, fingerprints(none), 1e-4)[0]


def test_hf_gradients_leave_the_model_alone_and_have_published_names():
    """Mixtral's experts are fused in memory; the weights stay, no `.grad` is left behind."""
    model = toy_models.build("mixtral")
    before = toy_models.weights_hash(model)
    weights = cotangents("mixtral", [torch.empty(4, 24, 131)])
    found = hf_gradients("mixtral", model, toy_models.inputs("mixtral"), weights)
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in found
    assert toy_models.weights_hash(model) == before
    assert all(p.grad is None for p in model.parameters())


def test_blocks_are_put_together_and_gaps_show():
    """Two ranks' halves of a tensor; what nobody wrote is NaN."""
    halves = [
        (np.array([1, 2], np.float32), [("w", Box(0, (2,), (1,)))]),
        (np.array([5, 6], np.float32), [("w", Box(4, (2,), (1,)))]),
    ]
    whole = grads.assemble(halves, {"w": (3, 2), "unused": (1,)})
    assert whole.keys() == {"w"}
    assert whole["w"][[0, 2]].tolist() == [[1, 2], [5, 6]]
    assert whole["w"][1].isnan().all()
