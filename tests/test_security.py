"""Nobody's code runs without permission, no path leaves its folder, nothing waits on what is no file, and nothing that is
printed speaks to the terminal (attacks 4, 5, 10, 13, 14)."""

import io
import json
import os
import pickle
import signal
import struct

import pytest
import safetensors
import torch

import toy_models
from bridges import CheckpointError, hf_pretrained
from bridges.checkpoints.pickles import check_metadata, restricted
from bridges.checkpoints.reader import Checkpoint
from bridges.hf_pretrained import PreTrainedCausalLM, load_config
from bridges.model_bridge import ConfigError
from harness import convert
from harness.report.cells import Cell, Report
from harness.report.console import Console, printable
from harness.report.terminal import print_table

ESCAPE = "\x1b]0;owned\x07\x1b[2J"


class Stranger:
    """Runs a command when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.fixture
def folder(tmp_path):
    return toy_models.write("llama2", tmp_path / "hf")


@pytest.fixture(scope="module")
def megatron(tmp_path_factory):
    base = tmp_path_factory.mktemp("m")
    convert.import_checkpoint(toy_models.write("llama2", base / "hf"), base / "megatron", "tp1", False)
    return base / "megatron"


@pytest.fixture
def alarm():
    """What waits for ever is interrupted: a pipe that nobody writes to."""

    def ring(_number, _frame):
        raise AssertionError("it waits for ever")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_attack_4_metadata_of_megatron_runs_no_code(megatron, tmp_path):
    """`convert export` unpickled it: with --no-trust-remote-code a crafted one ran a command."""
    file = megatron / "iter_0000000" / ".metadata"
    stock = file.read_bytes()
    try:
        file.write_bytes(pickle.dumps(Stranger(tmp_path / "owned")))
        with pytest.raises(CheckpointError, match=r"it names posix\.system, which could run code"):
            convert.export_checkpoint(megatron, tmp_path / "out", None, "tp1", False)
        with restricted(), pytest.raises(pickle.UnpicklingError):
            torch.distributed.checkpoint.FileSystemReader(file.parent).read_metadata()
    finally:
        file.write_bytes(stock)
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "out").exists()
    check_metadata(file.parent)


def test_attack_4_metadata_may_not_name_files_elsewhere(megatron):
    file = megatron / "iter_0000000" / ".metadata"
    stock = file.read_bytes()
    metadata = pickle.loads(stock)
    for info in metadata.storage_data.values():
        info.relative_path = "../../elsewhere"
    try:
        file.write_bytes(pickle.dumps(metadata))
        with pytest.raises(CheckpointError, match=r"names '\.\./\.\./elsewhere', which is no file of its folder"):
            check_metadata(file.parent)
    finally:
        file.write_bytes(stock)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("stranger/z--configuration_toy.ToyConfig", "code of 'stranger/z', another repository"),
        ("/tmp/configuration_toy.ToyConfig", "no module.Class of the folder"),
        ("../configuration_toy.ToyConfig", "no module.Class of the folder"),
        (7, "no module.Class of the folder"),
    ],
)
def test_attack_4_auto_map_stays_in_the_repository_that_is_trusted(tmp_path, monkeypatch, name, says):
    """Qwen is trusted, and so ran the code of a stranger whom its auto_map named."""
    ran = []
    monkeypatch.setattr(hf_pretrained.AutoConfig, "from_pretrained", lambda *a, **k: ran.append(a))
    raw = {"model_type": "toy", "architectures": ["ToyForCausalLM"]}
    for auto_map in (
        {"AutoConfig": name},
        {"AutoConfig": "configuration_toy.ToyConfig", "AutoTokenizer": [None, name]},
    ):
        with pytest.raises(ConfigError, match=says):
            load_config({**raw, "auto_map": auto_map}, tmp_path, True)
    assert not ran
    load_config({**raw, "auto_map": {"AutoConfig": "configuration_toy.ToyConfig"}}, tmp_path, True)
    assert ran


def test_attack_4_code_of_the_folder_is_no_link_out_of_it(tmp_path, monkeypatch):
    (tmp_path / "elsewhere.py").write_text("")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "configuration_toy.py").symlink_to(tmp_path / "elsewhere.py")
    raw = {"model_type": "toy", "auto_map": {"AutoConfig": "configuration_toy.ToyConfig"}}
    with pytest.raises(CheckpointError, match="outside the folder"):
        load_config(raw, tmp_path / "model", True)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.json"])
def test_attack_5_no_path_leaves_the_folder(folder, tmp_path, name):
    """A link was followed, and what it led to was copied into the export."""
    secret = tmp_path / "secret.json"
    secret.write_text((folder / name).read_text() if (folder / name).exists() else "{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match="outside the folder"):
        convert.roundtrip(folder, "tp1", tmp_path / "out", False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_attack_10_only_regular_files_are_read(folder, tmp_path, alarm, name, kind):
    """A named pipe as a file of the checkpoint made it wait for ever."""
    (folder / name).unlink(missing_ok=True)
    (os.mkfifo if kind == "pipe" else os.mkdir)(folder / name)
    if (name, kind) == ("tokenizer.json", "folder"):
        return  # an empty folder holds nothing that travels
    with pytest.raises((CheckpointError, ConfigError)):
        convert.roundtrip(folder, "tp1", tmp_path / "out", False)


def test_attack_10_an_endless_index_is_refused(folder, alarm):
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    (folder / "model.safetensors.index.json").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError):
        Checkpoint.open(folder)


def test_attack_13_nothing_printed_speaks_to_the_terminal():
    """Names and details come from files, and reached the terminal raw."""
    cell = Cell(ESCAPE, ESCAPE, "logits", "fail", 1.0, 0.1, "", 0.1, f"detail {ESCAPE}")
    out = io.StringIO()
    print_table(Report([], [cell], {}, 0.0, {}), Console(file=out, force_terminal=True, width=200))
    assert "\x1b]0;" not in out.getvalue()
    assert "\x1b[2J" not in out.getvalue()
    assert r"\x1b]0;owned" in out.getvalue()
    assert "\x1b[" in out.getvalue(), "our own colours are gone"
    assert printable("a\tb\nc é 模") == "a\tb\nc é 模"
    assert printable("\u202ex\x9b") == r"\u202ex\x9b"


def test_attack_13_the_line_of_an_error_is_printable(tmp_path, monkeypatch, capsys):
    from harness import cli

    monkeypatch.setattr("sys.argv", ["goldengate", "convert", "roundtrip", str(tmp_path / ESCAPE)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "\x1b" not in (said := capsys.readouterr().err)
    assert r"\x1b]0;owned" in said


ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    "header",
    [
        '{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"data_offsets":[0,4]}}',
        f'{{"__metadata__":{{}},"a":{ENTRY},"__metadata__":{{}}}}',
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}',
        f'{{"a":{ENTRY[:-1]},"more":1e999}}}}',
        f'{{"__metadata__":{{"x":"\\ud800"}},"a":{ENTRY}}}',
        f'{{"a":{ENTRY[:-1]},"more":"\\udc00"}}}}',
        '{"a":{"dtype":"F32","shape":[4294967296,4294967296,4294967296,0],"data_offsets":[0,0]}}',
    ],
)
def test_attack_14_what_the_safetensors_library_refuses_does_not_open(folder, header):
    file = folder / "model.safetensors"
    if not file.exists():
        for shard in folder.glob("*.safetensors*"):
            shard.unlink()
    text = header.encode()
    data = b"" if '"data_offsets":[0,0]' in header else bytes(4)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    with pytest.raises(safetensors.SafetensorError), safetensors.safe_open(file, "pt"):
        pass
    with pytest.raises(CheckpointError):
        Checkpoint.open(folder)


def test_attack_14_a_header_that_is_right_still_opens(folder):
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.tensors
    assert json.loads((folder / "config.json").read_text()) == PreTrainedCausalLM.open(folder).raw
