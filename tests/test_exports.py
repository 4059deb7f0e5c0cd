"""What an export says and carries beside its tensors: files, config.json, dtypes."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path

import pytest

import toy_models
from bridges import AutoBridge, CheckpointError
from bridges.checkpoints.companions import companions, travels
from harness import cli, convert, sweep

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
    import os

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
