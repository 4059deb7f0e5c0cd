"""What an export says and carries beside its tensors: files, config.json, dtypes."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import toy_models
from bridges import AutoBridge, CheckpointError, Layout
from bridges.checkpoints.companions import companions, travels
from bridges.checkpoints.comparison import same_bytes
from bridges.checkpoints.reader import Checkpoint
from bridges.derived_source import outline_of
from harness import cli, convert, sweep
from harness.ranks import jobs
from harness.ranks.pool import RankError

TRAVELS = [
    *("tokenization_x.py", "processing_x.py", "modeling_x.py", "qwen.tiktoken", "processor_config.json", "LICENSE"),
    *("additional_chat_templates/tool_use.jinja", "chat_template.jinja", "README.md", "vocab.json", "a/b/c.txt"),
    *("tokenizer.model", "generation_config.json", "tokenizer/tokenizer.json", "original/params.json"),
]
STAYS = [
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pth", "x.gguf", "consolidated.safetensors"),
    *(
        "consolidated.00.pth",
        "optimizer.pt",
        "training_args.bin",
        ".git/config",
        ".gitattributes",
        "flax_model.msgpack",
    ),
    *("checkpoint-500/tokenizer.json", "global_step1/x.json", "onnx/model.onnx", "runs/events.out.tfevents.1"),
    *("__pycache__/modeling_x.cpython-312.pyc", "original/model.safetensors", "adapter/.hidden"),
]


@pytest.fixture
def model(checkpoints, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoints("llama3"), tmp_path / "model"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folders: dict[str, Path] = {}

    def write(row: str) -> Path:
        if row not in folders:
            folders[row] = toy_models.write(row, tmp_path_factory.mktemp("rows") / row, shards=1)
        return folders[row]

    return write


def edit(folder: Path, **fields) -> Path:
    """Set fields of config.json; ... removes one."""
    config = {**json.loads((folder / "config.json").read_text()), **fields}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return folder


def test_fault_C6_every_file_travels(model, tmp_path):
    """All but weights, what training left and hidden files; the same bytes, in the same subfolders."""
    for path in (*TRAVELS, *STAYS):
        (model / path).parent.mkdir(parents=True, exist_ok=True)
        (model / path).write_text(f"this is {path}")
    assert convert.roundtrip(model, "tp1", tmp_path / "out", None)["differences"] == []
    found = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found == {*TRAVELS, "config.json", "model.safetensors"}
    assert all((tmp_path / "out" / path).read_text() == f"this is {path}" for path in TRAVELS)


def test_fault_C6_the_hub_is_asked_for_what_travels(monkeypatch, tmp_path):
    """And for weights in the one format that is read."""
    from huggingface_hub.utils import filter_repo_objects

    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **options: asked.update(options))
    with pytest.raises(CheckpointError):
        AutoBridge.from_hf_pretrained("org/no-such-model")
    weights = ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"]
    taken = set(filter_repo_objects([*TRAVELS, *STAYS, *weights], **asked))
    assert taken == {*TRAVELS, *weights}
    assert not any(map(travels, STAYS))


@pytest.mark.parametrize("kind", ["dead link", "link out", "pipe"])
def test_fault_E_what_cannot_travel_is_refused_before_work(model, tmp_path, monkeypatch, kind):
    """In one line that names it; a folder of that name is no obstacle."""
    (model / "tokenizer").mkdir()
    (tmp_path / "secret").write_text("secret")
    file = model / "tokenizer.json"
    {
        "dead link": lambda: file.symlink_to("nowhere"),
        "link out": lambda: file.symlink_to(tmp_path / "secret"),
        "pipe": lambda: os.mkfifo(file),
    }[kind]()
    with monkeypatch.context() as patch:
        patch.setattr(convert, "Ranks", None)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
            convert.roundtrip(model, "tp1", tmp_path / "out", None)
    file.unlink()
    assert "tokenizer.json" not in companions(model)


@pytest.mark.parametrize("option", ["--json", "--html"])
@pytest.mark.parametrize(("target", "says"), [("nowhere/x", "make it first"), (".", "is a folder")])
def test_fault_E_outputs_are_checked_before_work(tmp_path, monkeypatch, option, target, says):
    """`verify` has not begun when it says so."""
    import typer

    monkeypatch.setattr(sweep, "verify_rows", None)
    args = ["verify", "llama3", option, str(tmp_path / target)]
    with pytest.raises(ValueError, match=says):
        typer.main.get_command(cli.app).main(args, standalone_mode=False)


def test_fault_E_missing_distribution_metadata_costs_no_cell(monkeypatch):
    """The library's version is unknown, and the report says so."""

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert "unknown" in sweep.environment()["torch"]


# -- config.json: what was trained, as the source spells it ------------------------------------------------------------------


def written(folder: Path, **fields) -> dict:
    """config.json of an export whose provider fields were set so."""
    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider(load_weights=False)
    for name, value in fields.items():
        setattr(provider, name, value)
    return bridge.megatron_to_hf_config(provider)


LINEAR = {"rope_type": "linear", "factor": 4.0}
NEW = {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}


@pytest.mark.parametrize(
    ("source", "fields", "says"),
    [
        ({}, {"rotary_base": 7.0}, {"rope_theta": 7.0}),
        ({}, {"rope_scaling": LINEAR}, {"rope_scaling": LINEAR}),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_scaling": LINEAR},
         {"rope_scaling": {"type": "linear", "factor": 4.0}}),
        (NEW, {"rotary_base": 7.0}, {"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}),
        (NEW, {"rope_scaling": LINEAR}, {"rope_parameters": {"rope_theta": 500000.0, **LINEAR}}),
        ({**NEW, "rope_theta": 500000.0}, {"rotary_base": 7.0},
         {"rope_theta": 7.0, "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}),
        ({"torch_dtype": ..., "dtype": "float32"}, {"max_position_embeddings": 9}, {"max_position_embeddings": 9}),
        ({"torch_dtype": ...}, {"params_dtype": "torch.bfloat16"}, {}),
    ],
)  # fmt: skip
def test_fault_C1_a_change_lands_in_the_sources_spelling(model, source, fields, says):
    """Nothing else is added, and nothing stays stale."""
    edit(model, **source)
    raw = json.loads((model / "config.json").read_text())
    assert written(model) == raw
    assert written(model, **fields) == {**raw, **says}


def test_fault_C1_fields_of_one_rule_change_together(checkpoints, tmp_path):
    """Every second layer has experts, by a step; a new pattern must not be read with the old step."""
    folder = Path(shutil.copytree(checkpoints("qwen3_moe"), tmp_path / "moe"))
    edit(folder, decoder_sparse_step=2, mlp_only_layers=[])
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    found = written(folder, moe_layer_freq=[0] + [1] * (layers - 1))
    assert (found["decoder_sparse_step"], found["mlp_only_layers"]) == (1, [0])


def test_fault_C1_dense_layers_are_counted_or_listed_as_in_the_source(checkpoints):
    """GLM-4.5 publishes the count; transformers writes the list."""
    layers = 8
    found = written(checkpoints("glm4_moe"), moe_layer_freq=[0, 0, 0] + [1] * (layers - 3))
    assert found["first_k_dense_replace"] == 3
    assert "mlp_layer_types" not in found


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"dtype": "bfloat16"}, "torch_dtype = 'float32' and dtype = 'bfloat16'"),
        ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}, "rope_parameters.rope_theta = 7.0"),
    ],
)
def test_fault_C1_two_spellings_that_contradict_are_refused(model, fields, says):
    """All of them in one line."""
    with pytest.raises(ValueError, match=says):
        AutoBridge.from_hf_pretrained(edit(model, **fields))


# -- dtypes ------------------------------------------------------------------------------------------------------------------


def mixed(folder: Path) -> Path:
    """A bf16 model whose norms and head are kept in fp32."""
    tensors = load_file(folder / "model.safetensors")
    wide = ("norm.weight", "layernorm.weight", "lm_head.weight")
    save_file(
        {n: t if n.endswith(wide) else t.to(torch.bfloat16) for n, t in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return edit(folder, torch_dtype="bfloat16")


def test_fault_D5_all_wider_tensors_are_named_with_the_way_out(model, tmp_path):
    """Refused as it stands; exact in fp32; rounded when that is allowed, and then said to differ."""
    names = r"model\.layers\.\*\.input_layernorm\.weight,.*lm_head\.weight \(18 in all\) are float32.*--dtype float32.*--lossy"
    with pytest.raises(RankError, match=names):
        convert.roundtrip(mixed(model), "tp2", None, None)
    assert convert.roundtrip(model, "tp2", None, None, dtype="float32")["differences"] == []
    assert len(convert.roundtrip(model, "pp2", None, None, lossy=True)["differences"]) == 18


def test_fault_C2_a_trained_value_is_not_narrowed_without_a_word(checkpoints, tmp_path, ranks):
    """A bf16 source, trained in fp32: refused, or exported in fp32 with a config that says so; nothing is left behind."""
    source = toy_models.write("llama3", tmp_path / "bf16", shards=1, dtype=torch.bfloat16)
    out = [str(tmp_path / name) for name in ("refused", "wide", "lossy")]
    line = ranks.run(1, _train_and_export, str(source), out)[0]
    assert "model.norm.weight (1 in all) is float32 in Megatron and bfloat16 in the checkpoint" in line
    assert "dtype=torch.float32" in line
    assert not Path(out[0]).exists()
    for folder, dtype in zip(out[1:], ("float32", "bfloat16"), strict=True):
        assert json.loads((Path(folder) / "config.json").read_text())["torch_dtype"] == dtype
        tensors = load_file(Path(folder) / "model.safetensors")
        assert {str(t.dtype).removeprefix("torch.") for t in tensors.values()} == {dtype}


def _train_and_export(source: str, out: list[str]) -> str:
    jobs.use_layout(Layout.parse("tp1"))
    bridge = AutoBridge.from_hf_pretrained(source)
    provider = bridge.to_megatron_provider()
    provider.params_dtype, provider.bf16 = torch.float32, False
    chunks = provider.finalize().provide_distributed_model(wrap_with_ddp=False)
    with torch.no_grad():
        chunks[0].decoder.final_layernorm.weight += 1e-6
    with pytest.raises(ValueError) as live:
        next(iter(bridge.export_hf_weights(chunks)))
    with pytest.raises(ValueError) as error:
        bridge.save_hf_pretrained(chunks, out[0])
    assert str(live.value) == str(error.value)
    bridge.save_hf_pretrained(chunks, out[1], dtype=torch.float32)
    bridge.save_hf_pretrained(chunks, out[2], lossy=True)
    return str(error.value)


# -- Megatron folders --------------------------------------------------------------------------------------------------------


def test_fault_C3_D11_a_megatron_folder_knows_its_model(model, checkpoints, tmp_path):
    """It goes home without the source, named by its parent or itself, and is not taken for another model's."""
    (model / "LICENSE").write_text("free")
    megatron = tmp_path / "megatron"
    convert.import_checkpoint(model, megatron, "tp2", None)
    assert (megatron / "latest_checkpointed_iteration.txt").read_text().strip() == "0"
    assert (megatron / "iter_0000000" / "metadata.json").is_file()
    with pytest.raises(CheckpointError, match=r"another model.*bridge 'LlamaBridge' and 'MistralBridge'"):
        convert.export_checkpoint(megatron, tmp_path / "x", checkpoints("mistral"), "tp1", None)
    shutil.move(model, tmp_path / "source")
    for n, folder in enumerate((megatron, megatron / "iter_0000000")):
        out = tmp_path / f"out{n}"
        convert.export_checkpoint(folder, out, None, "pp2", None)
        with Checkpoint.open(tmp_path / "source") as a, Checkpoint.open(out) as b:
            assert same_bytes(a, b) == []
        assert {p.name for p in out.iterdir()} == {"LICENSE", "config.json", "model.safetensors"}
        assert json.loads((out / "config.json").read_text()) == json.loads(
            (tmp_path / "source" / "config.json").read_text()
        )
    alone = shutil.copytree(megatron / "iter_0000000", tmp_path / "alone")
    with pytest.raises(CheckpointError, match=r"does not say which model it is of.*--hf"):
        convert.export_checkpoint(alone, tmp_path / "y", None, "tp1", None)


def test_fault_D11_megatron_finds_what_it_resumes_from(model, tmp_path):
    """Arguments, version and iteration, loaded by Megatron's own function, which unpickles plain values only."""
    from megatron.core.dist_checkpointing import load_common_state_dict

    convert.import_checkpoint(model, tmp_path / "megatron", "tp1", None)
    state = load_common_state_dict(tmp_path / "megatron" / "iter_0000000")
    assert (state["iteration"], state["checkpoint_version"]) == (0, 3.0)
    assert (state["args"].num_layers, state["args"].hidden_size, state["args"].padded_vocab_size) == (8, 64, 131)


def test_fault_C2_an_fp32_megatron_checkpoint_is_not_narrowed(checkpoints, tmp_path):
    """By no reference's dtype: refused, or written wide."""
    source = toy_models.write("llama3", tmp_path / "bf16", shards=1, dtype=torch.bfloat16)
    convert.import_checkpoint(checkpoints("llama3"), tmp_path / "megatron", "tp1", None)
    with pytest.raises(RankError, match=r"float32 in Megatron and bfloat16 in the checkpoint.*--dtype float32"):
        convert.export_checkpoint(tmp_path / "megatron", tmp_path / "out", source, "tp1", None)
    convert.export_checkpoint(tmp_path / "megatron", tmp_path / "wide", source, "tp1", None, dtype="float32")
    with Checkpoint.open(checkpoints("llama3")) as a, Checkpoint.open(tmp_path / "wide") as b:
        assert same_bytes(a, b) == []


# -- what a source holds beside weights ---------------------------------------------------------------------------------------


def add(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file({**load_file(folder / "model.safetensors"), **tensors}, folder / "model.safetensors", {"format": "pt"})
    return folder


def frequencies(theta: float, dim: int) -> torch.Tensor:
    return theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("row", "theta", "dim"), [("llama3", 500000.0, 16), ("moonlight", None, None)])
def test_fault_D4_stored_rope_frequencies_are_checked_and_carried(checkpoints, tmp_path, row, theta, dim, dtype):
    """Every layer's, through Megatron's own checkpoint as well; those of another theta are refused."""
    folder = Path(shutil.copytree(checkpoints(row), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    theta, dim = theta or config["rope_theta"], dim or config["qk_rope_head_dim"]
    stored = frequencies(theta, dim).to(dtype)
    names = [f"model.layers.{n}.self_attn.rotary_emb.inv_freq" for n in range(2)]
    add(folder, {name: stored.clone() for name in names})
    assert convert.roundtrip(folder, "tp1", None, None)["differences"] == []
    convert.import_checkpoint(folder, tmp_path / "megatron", "tp1", None)
    convert.export_checkpoint(tmp_path / "megatron", tmp_path / "out", None, "tp1", None)
    with Checkpoint.open(folder) as a, Checkpoint.open(tmp_path / "out") as b:
        assert same_bytes(a, b) == []
    add(folder, {names[1]: frequencies(theta * 1.1, dim).to(dtype)})
    with pytest.raises(RankError, match=r"layers\.1\.self_attn\.rotary_emb\.inv_freq holds \d+ rope frequencies"):
        convert.roundtrip(folder, "tp1", None, None)


@pytest.mark.parametrize("size", [140, 120])
def test_fault_D12_a_vocabulary_of_another_size_is_said(model, size):
    """Both tensors, their rows, and the way out."""
    says = rf"vocab_size is {size}, but model\.embed_tokens\.weight has 131 rows and lm_head\.weight has 131 rows: set"
    with pytest.raises(RankError, match=says):
        convert.roundtrip(edit(model, vocab_size=size, bos_token_id=1, eos_token_id=2), "tp2", None, None)


# -- without a source -------------------------------------------------------------------------------------------------------


def _export_without_source(source: str, out: str, layout: str) -> None:
    jobs.use_layout(Layout.parse(layout))
    loader = AutoBridge.from_hf_pretrained(source)
    bridge = AutoBridge.from_hf_config(loader.hf_pretrained.config)
    provider = bridge.to_megatron_provider().apply_layout(layout).finalize()
    chunks = provider.provide_distributed_model(wrap_with_ddp=False)
    loader.load_hf_weights(chunks)
    with pytest.raises(CheckpointError, match="made from a config alone"):
        bridge.load_hf_weights(chunks)
    bridge.save_hf_pretrained(chunks, out)


@pytest.mark.parametrize(
    ("row", "layout"), [("llama3", "tp2"), ("llama3.2_tied", "pp2"), ("qwen3_moe", "tp1-ep2"), ("moonlight", "tp2")]
)
def test_a_model_from_a_config_alone_is_exported_without_a_source(checkpoints, tmp_path, ranks, row, layout):
    """Names, shapes, dtypes and bits are those of the published checkpoint, whose weights it was given by hand."""
    ranks.run(2, _export_without_source, str(checkpoints(row)), str(tmp_path / "out"), layout)
    wanted, found = (load_file(folder / "model.safetensors") for folder in (checkpoints(row), tmp_path / "out"))
    assert sorted(wanted) == sorted(found)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    first, second = (AutoBridge.from_hf_pretrained(folder) for folder in (checkpoints(row), tmp_path / "out"))
    assert convert._built(first) == convert._built(second)


def test_files_without_a_source_are_limited():
    """A larger tensor has a file of its own."""
    tensors = {name: (torch.bfloat16, (size,)) for name, size in (("a", 10), ("b", 30), ("c", 5), ("d", 4))}
    made = outline_of(tensors, limit=40)
    assert [names for names in made.files.values()] == [["a"], ["b"], ["c", "d"]]
    assert next(iter(made.files)) == "model-00001-of-00003.safetensors"
