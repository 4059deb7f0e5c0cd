"""goldengate new: a bridge and a row as far as files say."""

import ast
import json

import pytest
from typer.testing import CliRunner

import toy_models
from bridges.model_bridge import _REGISTERED
from harness import plugins, verify
from harness.cli import app
from harness.newcomer import blocks
from harness.newcomer.make import NewError, begin


@pytest.fixture
def without(monkeypatch):
    """Take a family's bridge away, as if nobody had written it; everything is put back."""
    before = dict(_REGISTERED)
    monkeypatch.setattr(plugins, "_loaded", {})
    monkeypatch.setenv(plugins.VARIABLE, "")
    yield lambda row: _REGISTERED.pop(toy_models.config_dict(row)["architectures"][0])
    _REGISTERED.clear()
    _REGISTERED.update(before)


def config_of(row, folder):
    file = folder / "config.json"
    file.write_text(json.dumps(toy_models.config_dict(row)))
    return str(file)


@pytest.mark.parametrize("row", ["qwen2_moe", "olmo2", "glm4", "starcoder2", "dots1", "moonlight"])
def test_a_family_that_files_describe_passes_without_a_person(row, without, tmp_path):
    """Biases, gated shared experts, norms over all heads and behind blocks, interleaved rope, LayerNorm and no gate, sigmoid
    routing, latent attention with an epsilon that stands in code: the bridge that is written computes the golden of the row whose own bridge was taken away."""
    without(row)
    begun = begin("begun", config_of(row, tmp_path), tmp_path, tmp_path / "rows")
    assert begun.open == []
    assert json.loads(begun.row_file.read_text())["architectures"] == toy_models.config_dict(row)["architectures"]
    report = verify(row, layouts=["tp1", "tp2-sp"], checks=["complete", "logits"])
    assert report.ok, report.summary()


def test_what_files_do_not_say_is_listed_and_stands_in_the_file(without, tmp_path):
    """Gated delta nets are a mechanism: each of their tensors is open, with its name, in the file too, which stays Python."""
    without("qwen3_next")
    begun = begin("begun", config_of("qwen3_next", tmp_path), tmp_path, tmp_path)
    assert any(line.startswith("mechanism GDN: as qwen3_5") for line in begun.open)
    assert any("linear_attn.A_log: no mapping knows it" in line for line in begun.open)
    text = begun.bridge_file.read_text()
    assert "mechanism GDN" in (ast.get_docstring(ast.parse(text)) or "")


def test_a_field_that_no_family_knows_is_named_with_its_place(without, tmp_path):
    """SmolLM3's layers without rope: no other family has the field, so a person must say what it means."""
    without("smollm3")
    begun = begin("begun", config_of("smollm3", tmp_path), tmp_path, tmp_path)
    opened = next(line for line in begun.open if line.startswith("field no_rope_layers"))
    assert "read at modeling_smollm3.py:" in opened


def test_blocks_are_read_from_names_and_shapes():
    """One norm a layer is a parallel block; a fused qkv and a plain feed-forward are named."""
    layer = {
        "input_layernorm.weight": (64,),
        "self_attn.qkv_proj.weight": (96, 64),
        "self_attn.dense.weight": (64, 64),
        "mlp.c_fc.weight": (128, 64),
        "mlp.c_proj.weight": (64, 128),
    }
    found = blocks.read({f"model.layers.0.{name}": shape for name, shape in layer.items()}, 4, "", "")
    assert found.calls == [
        "embeddings()",
        'attention(qkv="qkv_proj", output="dense")',
        'plain_mlp(names=("c_fc", "c_proj"))',
    ]
    assert found.defaults == {"gated_linear_unit": False, "parallel_blocks": True, "shared_norm": True}


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("a-b", {}, "no name for a family"),
        ("llama3", {"architectures": ["ArceeForCausalLM"], "model_type": "arcee"}, "a row named llama3 already"),
        ("ours", {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "has a bridge: LlamaBridge"),
        ("ours", {"architectures": ["NobodysForCausalLM"], "model_type": "nobodys"}, "transformers has no class"),
    ],
)
def test_what_cannot_be_begun_is_one_line(family, config, message, tmp_path):
    """A name that is none or taken, a bridge that is there, a model without a reference; nothing is written."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(NewError, match=message):
        begin(family, str(tmp_path / "config.json"), tmp_path / "bridges", tmp_path / "rows")
    assert not (tmp_path / "rows").exists()


def test_the_command_says_what_comes_next_and_overwrites_nothing(without, tmp_path, monkeypatch):
    """In a folder that is no repository of bridges the files lie here; a second time is refused."""
    without("qwen2")
    monkeypatch.chdir(tmp_path)
    words = ["new", "begun", "--from", config_of("qwen2", tmp_path)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "nothing that files could show" in result.output
    assert "goldengate verify rows/begun.json --plugin begun.py" in result.output
    again = CliRunner().invoke(app, words)
    assert "begun.py is there already" in str(again.exception)
