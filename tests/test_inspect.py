"""goldengate inspect: what a model is, answered from its files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import toy_models
from bridges.layout import Layout
from bridges.model_bridge import _REGISTERED
from harness import plan
from harness.cli import app
from harness.flops.command import load_bridge
from harness.inspection import held, parameters
from harness.inspection.inspect import inspect
from harness.inspection.lines import lines

TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 131}
VISION = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "text_config": {**TEXT, "model_type": "qwen3_vl_text", "num_key_value_heads": 2, "head_dim": 16},
    "vision_config": {"model_type": "qwen3_vl", "depth": 2, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64},
}
NOBODYS = {
    **TEXT,
    "architectures": ["NobodysForCausalLM"],
    "model_type": "nobodys",
    "auto_map": {"AutoConfig": "configuration_nobodys.NobodysConfig"},
    "wormhole_factor": 3,
    "kv_lora_rank": 16,
    "tie_word_embeddings": True,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


def written(folder, config):
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize(
    ("row", "layouts"),
    [
        ("llama3", ["tp2-pp4"]),
        ("deepseek_v3", ["tp2-pp2-ep2-etp1", "pp4"]),
        ("qwen3_next", ["tp2-pp2"]),
        ("gemma2", ["tp2-pp2"]),
    ],
)
def test_bytes_of_a_gpu_are_those_of_megatrons_own_model(row, layouts):
    """What `inspect --gpus` works out from one whole model is what Megatron-Core builds in each stage of the layout."""
    sums = held.Sums(held.whole(load_bridge(row)))
    for layout in map(Layout.parse, layouts):
        ranks = plan.plan(row, layout, "float32").ranks
        built = [max(rank.bytes for rank in ranks if rank.stage == stage) // 4 for stage in range(layout.pp)]
        assert [sum(sums.elements(layout, stage)) for stage in range(layout.pp)] == built


def test_layouts_that_fit_use_all_gpus_and_stay_below_their_memory():
    """Every layout is one that parses and the model divides into; with too little memory the smallest is named."""
    found = inspect("qwen3_moe", gpus=8, memory=1).layouts
    assert found
    assert found.fits
    assert found.smallest is None
    assert {Layout.parse(fit.layout).world_size for fit in found.fits} == {8}
    assert any("ep" in fit.layout for fit in found.fits)
    assert all(fit.total == 18 * fit.elements and fit.optimizer_distributed <= fit.optimizer for fit in found.fits)
    none = inspect("qwen3_moe", gpus=8, memory=1e-4).layouts
    assert none
    assert not none.fits
    assert none.smallest
    assert none.smallest.total > 1e-4 * 2**30


def test_a_row_is_what_its_bridge_says():
    """Bridge, mechanisms from the provider, parameters by part that sum up to transformers' own number."""
    found = inspect("deepseek_v3")
    assert (found.bridge, found.kind, found.tied) == ("DeepseekV3Bridge", "language model", False)
    assert {"MoE", "MLA", "MTP"} <= set(found.mechanisms)
    counted = found.parameters
    assert counted
    assert counted.total == sum(counted.parts.values()) > counted.active
    own = sum(p.numel() for p in toy_models.build("deepseek_v3").parameters())
    assert counted.total - own == sum(size for part, size in counted.parts.items() if part.startswith("mtp."))
    assert not found.notes
    assert not found.fields.unknown


def test_a_model_without_a_bridge_has_neighbours_and_places(monkeypatch, tmp_path):
    """Qwen3-MoE as if nobody had built it: which family is nearest by mechanisms, and where each field that the tables of all
    bridges do not know is read."""
    monkeypatch.delitem(_REGISTERED, "Qwen3MoeForCausalLM")
    config = {**toy_models.config_dict("qwen3_moe"), "nonsense": 7}
    found = inspect(written(tmp_path, config))
    assert found.bridge == ""
    assert {"MoE", "q/k norm"} <= set(found.mechanisms)
    assert found.nearest[0].lacks == []
    places = {one.name: one.read_at for one in found.fields.unknown}
    assert places["norm_topk_prob"].startswith("modeling_qwen3_moe.py:")
    assert "nonsense" in found.fields.unread
    assert found.parameters
    assert found.parameters.total == sum(p.numel() for p in toy_models.build("qwen3_moe").parameters())


def test_a_vision_language_model_says_where_its_text_is(tmp_path):
    """The kind, the path of the text fields and the tower beside them."""
    found = inspect(written(tmp_path, VISION))
    assert (found.kind, found.text_at, found.towers) == ("vision-language model", "text_config", ["vision_config"])
    assert found.parameters
    assert any(part.startswith("visual") for part in found.parameters.parts)
    assert "q/k norm" in found.mechanisms


def test_code_that_is_not_run_is_answered_from_the_fields_alone(tmp_path):
    """No class, no bridge, no permission: mechanisms, quantisation and unknown fields are told, and nothing is run."""
    found = inspect(written(tmp_path, NOBODYS))
    assert {"MLA", "tied", "dense"} <= set(found.mechanisms)
    assert found.tied
    assert found.quantised
    assert found.quantised["method"] == "fp8"
    assert "wormhole_factor" in [one.name for one in found.fields.unknown]
    assert found.parameters is None
    assert any("fp8" in line for line in lines(found))


def test_a_checkpoint_is_compared_with_the_mappings(tmp_path):
    """One tensor too many, one too few and the dtypes are named."""
    folder = tmp_path / "model"
    toy_models.write("llama3", folder)
    file = next(folder.glob("*.safetensors"))
    for index in folder.glob("*.index.json"):
        index.unlink()
    tensors = {name: tensor for one in folder.glob("*.safetensors") for name, tensor in load_file(one).items()}
    for one in folder.glob("*.safetensors"):
        one.unlink()
    gone = "model.layers.3.mlp.up_proj.weight"
    tensors.pop(gone)
    tensors["model.extra.weight"] = torch.ones(3, dtype=torch.bfloat16)
    save_file(tensors, file.parent / "model.safetensors", {"format": "pt"})
    checkpoint = inspect(str(folder)).checkpoint
    assert checkpoint
    assert (checkpoint.missing, checkpoint.unknown) == ([gone], ["model.extra.weight"])
    assert checkpoint.dtypes["bfloat16"] == 1


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.7.self_attn.q_proj.weight", "layers.self_attn"),
        ("model.layers.7.mlp.experts.gate_up_proj", "layers.mlp.experts"),
        ("model.layers.7.mlp.experts.3.up_proj.weight", "layers.mlp.experts"),
        ("model.layers.7.post_attention_layernorm.weight", "layers.norms"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_the_part_of_a_parameter(name, part):
    """Layers are counted together, by what is in them."""
    assert parameters.part_of(name) == part


def test_the_command_prints_and_writes_json(tmp_path):
    """A line for each finding; the JSON has all of them."""
    file = tmp_path / "out.json"
    result = CliRunner().invoke(app, ["inspect", "llama3", "--gpus", "4", "--memory", "1", "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert "LlamaBridge" in result.output
    data = json.loads(file.read_text())
    assert data["bridge"] == "LlamaBridge"
    assert {fit["layout"] for fit in data["layouts"]["fits"]} >= {"dp4", "tp2-dp2", "tp4"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lama3"], "neither a row"),
        (["llama3", "--gpus", "8"], "belong together"),
        (["llama3", "--gpus", "8", "--memory", "-1"], "some memory"),
    ],
)
def test_bad_words_are_one_line(words, message):
    """What is no target, half a question, no memory."""
    result = CliRunner().invoke(app, ["inspect", *words])
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)
