"""The check `grads`: Megatron's finalised gradients under Hugging Face names, and what it must catch."""

import pytest

from bridges import cpu_backend
from bridges.families.llama import LlamaBridge
from bridges.mapping import MegatronMappingRegistry, QKVMapping
from harness.sweep import verify, verify_rows

Q, K = "model.layers.*.self_attn.q_proj.weight", "model.layers.*.self_attn.k_proj.weight"
V = "model.layers.*.self_attn.v_proj.weight"
QKV = "decoder.layers.*.self_attention.linear_qkv.weight"


class SwappedKV(LlamaBridge):
    """Keys and values exchanged, on import and on export."""

    def mapping_registry(self):
        return MegatronMappingRegistry(QKVMapping(QKV, q=Q, k=V, v=K), *super().mapping_registry())


def test_gradients_agree_in_parallel_layouts():
    """Dense and tied, with sequence parallel, virtual stages and context parallel: every parameter's gradient, near 1e-6."""
    report = verify_rows(["llama3.2_tied"], which=["tp1", "tp2-sp", "pp2-vpp2", "cp2"], checks=["grads"])
    assert report.summary()["pass"] == 4, [c.detail for c in report.cells]
    assert all(c.value is not None and c.value < 1e-5 for c in report.cells)
    assert "74 gradients" in report.cells[0].detail


def test_gradients_of_experts_agree_under_expert_parallel():
    """Tokens come from other data-parallel replicas; the expert data-parallel reduction puts their gradients together."""
    report = verify("qwen3_moe", layouts=["ep2"], checks=["grads"])
    assert report.ok, report.cells[0].detail


def test_a_buffer_without_gradient_is_listed():
    """The bias that chooses experts gets no gradient by nature: it is named, not skipped silently."""
    report = verify("dots1", layouts=["tp1"], checks=["grads"])
    assert report.ok, report.cells[0].detail
    assert "without gradient by nature: model.layers.1.mlp.gate.e_score_correction_bias" in report.cells[0].detail


def test_swapped_tensors_have_other_gradients():
    """k and v swapped both ways keeps the bytes; the gradients are other tensors'."""
    cell = verify("llama3", bridge=SwappedKV, layouts=["tp1"], checks=["grads"]).cells[0]
    assert cell.status == "fail"
    assert "gradient of" in cell.detail
    assert cell.value > 0.1


def test_a_norm_that_is_not_reduced_under_sequence_parallel_fails(monkeypatch):
    """Megatron sums a replicated norm's gradient over tensor parallel only when the parameter says so."""
    original = cpu_backend._norm_parameter

    def silent(config, size):
        parameter = original(config, size)
        parameter.sequence_parallel = False
        return parameter

    monkeypatch.setattr(cpu_backend, "_norm_parameter", silent)
    cell = verify("llama3", layouts=["tp2-sp"], checks=["grads"]).cells[0]
    assert cell.status == "fail"
    assert "norm" in cell.detail


@pytest.mark.parametrize("layout", ["tp1"])
def test_the_untouched_bridge_passes_the_same_path(layout):
    """What the mutants above fail is not the path."""
    assert verify("llama3", bridge=LlamaBridge, layouts=[layout], checks=["grads"]).ok
