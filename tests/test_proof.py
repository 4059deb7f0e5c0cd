"""The proof by metadata covers every axis (faults G), and `goldengate plan`, which prints it."""

from __future__ import annotations

import copy
import json
import re

import pytest
from typer.testing import CliRunner

from bridges import ColumnParallelMapping, ReplicatedMapping
from bridges.conversion.mapping import MegatronMappingRegistry
from bridges.families.qwen3 import Qwen3MoeBridge
from bridges.layout import Layout
from bridges.providers import skeleton
from harness import plan as planning
from harness.checks.complete import holdings as real_holdings
from harness.checks.subject import Bench, Subject
from harness.cli import app
from harness.ranks.pool import Ranks

LAYOUT = "tp2-pp2-ep2"

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}

# deepseek-ai/DeepSeek-V3, config.json, without its quantization_config.
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
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
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def errors_of(row: str = "qwen3_moe", layout: str = LAYOUT) -> str:
    """What the proof says of a row whose bridge or placement a test has broken; it must not pass."""
    coverage = planning.plan(row, layout).coverage
    assert not coverage.ok
    return "\n".join(coverage.errors)


def declare(monkeypatch, ending: str, change) -> None:
    """Let qwen3_moe's bridge declare the parameters whose names end so as `change(mapping)`."""
    original = Qwen3MoeBridge.mapping_registry

    def mapping_registry(self):
        return MegatronMappingRegistry(
            *(change(copy.copy(m)) if m.megatron_param.endswith(ending) else m for m in original(self))
        )

    monkeypatch.setattr(Qwen3MoeBridge, "mapping_registry", mapping_registry)


def column(mapping):
    return ColumnParallelMapping(mapping.megatron_param, mapping.parts[0].hf)


def padded(mapping):
    mapping.padded = True
    return mapping


# -- faults G ----------------------------------------------------------------------------------------------------------


def test_what_the_mutants_break_is_proven():
    assert planning.plan("qwen3_moe", LAYOUT).coverage.ok


def test_fault_G_every_expert_rank_takes_the_first_experts(monkeypatch):
    """The first experts have two homes, the last ones none."""
    monkeypatch.setattr(skeleton.parallel_state, "get_expert_model_parallel_rank", lambda: 0)
    errors = errors_of()
    assert "mlp.experts.linear_fc1.weight0 is held by expert ranks 0, 1" in errors
    assert re.search(r"mlp\.experts\.\d+\.gate_proj\.weight: no Megatron parameter reads it", errors)


def test_fault_G_every_stage_takes_the_first_layers(monkeypatch):
    """The first layers have two homes, the last ones none."""
    original = skeleton.global_tensors

    def from_zero(chunks):
        found = list(original(chunks))
        first = min(int(name.split(".")[2]) for name, _ in found if name.startswith("decoder.layers."))
        for name, tensor in found:
            head, layers, *rest = name.split(".")
            number = [str(int(rest[0]) - first), *rest[1:]] if layers == "layers" else rest
            yield ".".join((head, layers, *number)), tensor

    monkeypatch.setattr(skeleton, "global_tensors", from_zero)
    errors = errors_of()
    assert "decoder.layers.0.mlp.router.weight is held by stages 0, 1" in errors
    assert re.search(r"model\.layers\.\d+\.mlp\.gate\.weight: no Megatron parameter reads it", errors)


def test_fault_G_a_router_declared_column_parallel(monkeypatch):
    """Megatron holds all of it on every tensor rank."""
    declare(monkeypatch, "router.weight", column)
    assert "mlp.gate.weight as Megatron's decoder.layers.0.mlp.router.weight" in errors_of()


def test_fault_G_an_output_projection_declared_replicated(monkeypatch):
    """Megatron holds a part of its columns on every tensor rank."""
    declare(monkeypatch, "linear_proj.weight", lambda m: ReplicatedMapping(m.megatron_param, m.parts[0].hf))
    assert "self_attn.o_proj.weight as Megatron's decoder.layers.0.self_attention.linear_proj" in errors_of()


@pytest.mark.parametrize("ending", ["linear_qkv.weight", "experts.linear_fc1.weight*", "linear_proj.weight"])
def test_fault_G_padding_is_for_the_vocabulary_alone(monkeypatch, ending):
    """A declaration that allows gaps elsewhere is refused, whether or not it leaves any."""
    declare(monkeypatch, ending, padded)
    assert "declared as padded, but only the rows of a vocabulary are" in errors_of()


def test_fault_G_a_padded_column_parallel_router(monkeypatch):
    """Its gap would hide that rank 1 has nothing: every tensor's elements are then read exactly once."""
    declare(monkeypatch, "router.weight", lambda m: padded(column(m)))
    assert "router.weight (8, 64): declared as padded" in re.sub(r"\(\d+, \d+\)", "(8, 64)", errors_of())


def test_fault_G_a_gap_in_the_vocabulary_that_is_no_padding(monkeypatch):
    """One token too few on disk: the provider says how many rows may be padding."""
    original = planning._tensors

    def one_less(*args):
        tensors, names_from = original(*args)
        rows, width = tensors["lm_head.weight"]
        return {**tensors, "lm_head.weight": (rows - 1, width)}, names_from

    monkeypatch.setattr(planning, "_tensors", one_less)
    assert "lm_head.weight" in errors_of()


@pytest.mark.parametrize("layout", ["tp2-pp2-ep2", "pp2-vpp2", "tp2-ep2-etp1"])
@pytest.mark.parametrize("row", ["deepseek_v3", "qwen3_next"])
def test_the_skeleton_holds_what_real_ranks_hold(row, layout, tmp_path):
    """Names, shapes and order of every stage and expert rank: fake groups on the meta device against real ones."""
    subject, ranks = Subject.make(row, tmp_path), Ranks()
    try:
        bench = Bench(subject, Layout.parse(layout), ranks, tmp_path)
        bench.build()
    finally:
        ranks.close()
    real, differing = real_holdings(bench)
    assert not differing
    found = planning.plan(str(subject.folder), layout)
    assert found.coverage.ok
    assert found.coverage.hf_tensors == len(subject.source.tensors)
    assert {(r.stage, r.expert_rank): r.parameters for r in found.ranks} == {k: len(v) for k, v in real.items()}
    assert found.held == {place: [(one.name, one.shape) for one in held] for place, held in real.items()}


# -- goldengate plan ---------------------------------------------------------------------------------------------------


def run(*args: str):
    return CliRunner().invoke(app, ["plan", *args])


def config_file(folder, config: dict) -> str:
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    return str(file)


def test_plan_of_a_small_config(tmp_path):
    """Everything counted by hand: a tied Llama of three layers over tp2-pp2, whose last stage holds the embedding again."""
    target = tmp_path / "plan.json"
    result = run(config_file(tmp_path, LLAMA), "--layout", "tp2-pp2", "--json", str(target))
    assert result.exit_code == 0, result.output
    assert "proven in tp2-pp2: 4 ranks" in result.output
    assert "transformers' LlamaForCausalLM" in result.output
    found = json.loads(target.read_text())
    layer = 64 * 64 * 2 + 2 * 16 * 64 + 3 * 96 * 64 + 2 * 64
    assert found["hf"]["tensors"] == 2 + 3 * 9
    assert found["proof"]["hf_elements"] == 131 * 64 + 3 * layer + 64
    assert found["hf"]["bytes"] == 2 * found["proof"]["hf_elements"]
    held = layer - 2 * 64  # of a layer's matrices a tensor rank holds half, of its norms all
    first, last = found["ranks"]
    assert first["bytes"] == 2 * (66 * 64 + 2 * (held // 2 + 2 * 64))
    assert last["bytes"] == 2 * (66 * 64 + held // 2 + 2 * 64 + 64)
    assert (first["rank"], last["rank"]) == (0, 2)
    assert found["largest"]["rank"] == found["slowest"]["rank"] == 0
    assert first["peak"] == first["bytes"] + first["reads"]


def test_plan_in_another_dtype(tmp_path):
    """Four bytes an element, and nothing else changes."""
    found = planning.plan(config_file(tmp_path, LLAMA), "tp2-pp2", "float32")
    narrow = planning.plan(config_file(tmp_path, LLAMA), "tp2-pp2")
    assert [r.bytes for r in found.ranks] == [2 * r.bytes for r in narrow.ranks]


def test_plan_of_a_model_with_scaled_rope(tmp_path):
    """Frequencies are computed while the model is built on the meta device."""
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert planning.plan(config_file(tmp_path, LLAMA | {"rope_scaling": scaling}), "tp2-pp2").coverage.ok


def test_plan_of_kimi_k2_has_the_published_names(tmp_path):
    """Its model type is not transformers' own; the experts are published one by one all the same. MTP: none."""
    small = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "kimi_k2",
        "num_nextn_predict_layers": 0,
        "num_hidden_layers": 4,
        "n_routed_experts": 16,
        "n_group": 1,
        "topk_group": 1,
    }
    found = planning.plan(config_file(tmp_path, DEEPSEEK_V3 | small), "tp2-pp2-ep2")
    assert found.coverage.ok, found.coverage.errors[:3]
    assert found.tensors == 16 * 3 + 4 * 9 + 5 + 3 * 3 + 3


@pytest.mark.parametrize("row", ["ernie4_5_moe", "mixtral", "phi3", "mimo_7b", "bailing_moe_v2"])
def test_plan_of_rows_that_publish_other_names(row):
    """Fused, renamed, or of a class that transformers does not have."""
    assert planning.plan(row, "tp2-pp2").coverage.ok


def test_plan_of_deepseek_v3_at_its_published_size(tmp_path):
    """671B parameters, and 11.5B of multi-token prediction that are not the main model's own (README_WEIGHTS.md), on 8,192
    ranks."""
    found = planning.plan(config_file(tmp_path, DEEPSEEK_V3), "tp8-pp16-ep64")
    assert found.coverage.ok, found.coverage.errors[:3]
    assert found.layout.world_size == 8192
    assert found.coverage.hf_elements == 671_026_419_200 + 11_610_068_224
    assert found.coverage.megatron_elements == found.coverage.hf_elements  # nothing is padded
    assert len(found.ranks) == 16 * 64
    experts = 58 * 256 + 256
    assert found.tensors == experts * 3 + 61 * 9 + 58 * 5 + 3 * 3 + 3 + 9 + 5 + 4


@pytest.mark.parametrize(
    ("change", "layout", "words"),
    [
        ({}, "tp3", "8 attention heads cannot be divided by tp=3"),
        ({}, "tp2-xx2", "cannot read 'xx2'"),
        ({"architectures": ["NobodyForCausalLM"], "model_type": "nobody"}, "tp1", "NobodyForCausalLM has no bridge"),
    ],
)
def test_plan_of_what_cannot_be_is_bad_input(tmp_path, change, layout, words):
    """An error of ours, which the command line turns into exit code 2."""
    result = run(config_file(tmp_path, LLAMA | change), "--layout", layout)
    assert isinstance(result.exception, ValueError)
    assert words in str(result.exception)


def test_plan_exits_1_and_names_what_is_wrong(monkeypatch):
    """In ten lines at most."""
    declare(monkeypatch, "router.weight", column)
    result = run("qwen3_moe", "--layout", "tp2")
    assert result.exit_code == 1
    assert "NOT PROVEN in tp2" in result.output
    assert "router.weight" in result.output


def test_a_plan_leaves_no_process_groups_behind():
    """The fake world is in a process of its own."""
    from megatron.core import parallel_state

    planning.plan("llama3", "tp2")
    assert not parallel_state.model_parallel_is_initialized()


def test_a_process_with_groups_is_no_place_for_a_skeleton(monkeypatch):
    """It would replace them."""
    monkeypatch.setattr(skeleton.dist, "is_initialized", lambda: True)
    with pytest.raises(skeleton.SkeletonError, match="has process groups"):
        planning.plan("llama3", "tp2")
