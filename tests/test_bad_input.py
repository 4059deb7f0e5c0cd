"""What a user can get wrong, through the real command line: one clear line, a non-zero exit, nothing half-written.

Commands run in a fork of this process, which has torch and Megatron imported already: a fresh interpreter takes eleven
seconds. One test at the end uses a fresh one all the same.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from transformers import dynamic_module_utils

import toy_models
from bridges import AutoBridge
from bridges.checkpoints.comparison import same_bytes
from bridges.checkpoints.reader import Checkpoint
from harness import cli, convert
from harness.ranks.pool import Ranks
from harness.reference import goldens

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Q = "model.layers.3.self_attn.q_proj.weight"
K = "model.layers.3.self_attn.k_proj.weight"
DOWN = "model.layers.3.mlp.down_proj.weight"
PROGRESS = re.compile(r"(import|export|save|load) \S+ .* parameters \d:\d\d:\d\d")

numbers = itertools.count()


@dataclass(frozen=True)
class Ended:
    """A command that has ended: its exit code, standard output, and the lines of standard error."""

    code: int
    out: str
    err: list[str]


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """Imports what the command line needs only when a command is parsed, once for all forks."""
    with pytest.raises(ValueError):
        typer.main.get_command(cli.app).main(["verify", "no such row"], standalone_mode=False)


def goldengate(folder: Path, *args: str | Path, before: Callable[[], None] = lambda: None) -> Ended:
    """Run the command in a fork, in which `before` is called first: its ranks are forked from it and inherit that."""
    out, err = (folder.with_name(f"{folder.name}-{next(numbers)}.{stream}") for stream in ("out", "err"))
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            for descriptor, file in ((1, out), (2, err)):
                os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), descriptor)
            sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", closefd=False) for descriptor in (1, 2))
            sys.argv = ["goldengate", *map(str, args)]
            Ranks._active = None  # ranks of other tests are not the command's to end
            before()
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 71
        except BaseException:  # it must not get back into pytest
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return Ended(os.waitstatus_to_exitcode(status), out.read_text(), err.read_text().splitlines())


def state(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: {path: content, None for a folder}."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(folder: Path, *args: str | Path, says: str, before: Callable[[], None] = lambda: None) -> str:
    """The line with which the command refuses: exit code 2, that one line after any progress, nothing on standard
    output, and all that is in `folder` as it was."""
    files = state(folder)
    ended = goldengate(folder, *args, before=before)
    assert ended.code == 2, ended
    assert ended.out == ""
    *progress, line = ended.err
    assert [text for text in progress if not PROGRESS.fullmatch(text)] == []
    assert line.startswith("goldengate: ")
    assert re.search(says, line), line
    assert state(folder) == files
    return line


# Good checkpoints, and ways to damage a copy.


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Callable[..., Path]:
    """A row's checkpoint, written once; not to be changed."""
    made: dict[tuple, Path] = {}

    def write(row: str = "llama3", shards: int = 1, dtype: torch.dtype | None = None) -> Path:
        key = (row, shards, dtype)
        if key not in made:
            made[key] = toy_models.write(row, tmp_path_factory.mktemp("good") / row, shards=shards, dtype=dtype)
        return made[key]

    return write


@pytest.fixture
def copy(good, tmp_path) -> Callable[..., Path]:
    """A copy of a row's checkpoint in the test's own folder."""

    def make(*args, **options) -> Path:
        return Path(shutil.copytree(good(*args, **options), tmp_path / "model"))

    return make


def edit_config(folder: Path, **fields) -> None:
    """Set fields of config.json; ... removes one."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, {"format": "pt"})


def edit_index(folder: Path, file: str) -> None:
    """The index says that the first tensor is in `file`."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = file
    (folder / INDEX).write_text(json.dumps(index))


def cut(folder: Path, size: int) -> None:
    """Keep `size` bytes of the weights; a negative size counts from the end."""
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:size])


def garble_header(folder: Path) -> None:
    with open(folder / SINGLE, "r+b") as file:
        file.seek(8)
        file.write(b"\xff" * 20)


# Files.


@pytest.mark.parametrize(
    ("shards", "damage", "says"),
    [
        (1, lambda f: cut(f, -100), r"model\.safetensors is truncated: 100 of \d+ bytes are missing"),
        (1, lambda f: cut(f, 40), r"model\.safetensors is truncated: its header misses \d+ bytes"),
        (1, lambda f: cut(f, 0), r"model\.safetensors is truncated: 0 bytes hold no header"),
        (1, garble_header, r"model\.safetensors has a header that is not JSON"),
        (3, lambda f: (f / "model-00002-of-00003.safetensors").unlink(), r"index\.json names model-00002-of-00003"),
        (3, lambda f: edit_index(f, "model-9.safetensors"), r"index\.json names model-9\.safetensors"),
        (
            3,
            lambda f: edit_index(f, "../x.safetensors"),
            r"index\.json names '\.\./x\.safetensors'.* out of the folder",
        ),
        (3, lambda f: edit_index(f, "/etc/passwd"), r"index\.json names '/etc/passwd'.* out of the folder"),
        (3, lambda f: (f / INDEX).write_text("{"), r"index\.json is not JSON"),
        (1, lambda f: (f / SINGLE).unlink(), r"model has neither model\.safetensors nor"),
        (1, lambda f: (f / "config.json").unlink(), r"model has no config\.json"),
        (1, lambda f: (f / "config.json").write_text("[]"), r"config\.json does not hold a JSON object"),
    ],
)
def test_a_broken_folder_is_refused(copy, tmp_path, shards, damage, says):
    """The line names the file; nothing is written beside the folder or into it."""
    folder = copy(shards=shards)
    damage(folder)
    refused(tmp_path, "convert", "roundtrip", folder, "--layout", "tp2", says=says)


@pytest.mark.parametrize("command", ["import", "export"])
def test_every_conversion_refuses_a_broken_folder(copy, megatron, tmp_path, command):
    """Import and export, where the folder is the reference, look at it before they make anything."""
    folder, target = copy(), tmp_path / "target"
    cut(folder, -100)
    args = {"import": (folder, target), "export": (megatron, target, "--hf", folder)}[command]
    refused(tmp_path, "convert", command, *args, says=r"model\.safetensors is truncated: 100 of")


# Tensors.


def put(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.update({name: tensor}))


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(name))


QKV = r"as Megatron's decoder\.layers\.3\.self_attention\.linear_qkv\.weight"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (put("model.layers.0.extra.weight", torch.ones(3)), r"tensor model\.layers\.0\.extra\.weight is not used"),
        (drop(K), rf"{re.escape(K)} is missing: Megatron's decoder\.layers\.3\.self_attention\.linear_qkv\.weight"),
        (drop("lm_head.weight"), r"lm_head\.weight is missing: Megatron's output_layer\.weight"),
        (
            put(Q, torch.ones(63, 64)),
            rf"{re.escape(Q)} {QKV}: shape \(63, 64\): dim 0 has 63; `\(g n d\)` with g=2, n=2, d=16 needs 64",
        ),
        (
            put(K, torch.ones(33, 64)),
            rf"{re.escape(K)} {QKV}: shape \(33, 64\): dim 0 has 33; `\(g d\)` with g=2, d=16 needs 32",
        ),
        (put(Q, torch.ones(64 * 64)), rf"{re.escape(Q)} {QKV}: shape \(4096,\) has 1 dims; `\(g n d\) h"),
        (put(DOWN, torch.ones(64, 94)), rf"{re.escape(DOWN)} as .*linear_fc2\.weight: .* Megatron holds \(64, 48\)"),
        (put(DOWN, torch.ones(64, 95)), rf"{re.escape(DOWN)} as .*shape \(64, 95\): dim 1 has 95.* multiple of 2"),
        (put("model.norm.weight", torch.ones(63)), r"model\.norm\.weight as .*shape \(63,\); Megatron holds \(64,\)"),
        (
            put("model.embed_tokens.weight", torch.ones(130, 64)),
            r"vocab_size is 131, but model\.embed_tokens\.weight has 130 rows: set vocab_size to 130 in config\.json",
        ),
        (
            put("lm_head.weight", torch.ones(132, 64)),
            r"vocab_size is 131, but lm_head\.weight has 132 rows: set vocab_size to 132 in config\.json",
        ),
        (put(DOWN, torch.ones(64, 96, dtype=torch.int8)), rf"{re.escape(DOWN)} is int8 .* dequantise"),
        (put(DOWN, torch.ones(64, 96).to(torch.float8_e4m3fn)), rf"{re.escape(DOWN)} is float8_e4m3fn .* dequantise"),
        (
            put(DOWN, torch.full((64, 96), 0.1, dtype=torch.float64)),  # no float32 is 0.1 to float64's precision
            r"model\.layers\.\*\.mlp\.down_proj\.weight \(1 in all\) is float64 .* precision would be lost",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(copy, tmp_path, damage, says):
    """The line names the tensor, and for a shape the factors that it should have."""
    folder = copy()
    damage(folder)
    refused(tmp_path, "convert", "import", folder, tmp_path / "target", "--layout", "tp2", says=says)


def test_a_float32_tensor_in_a_bfloat16_model_is_refused(copy, tmp_path):
    """Rounding it would lose what somebody kept on purpose."""
    folder = copy(dtype=torch.bfloat16)
    put("model.norm.weight", torch.full((64,), 1.001))(folder)
    says = r"model\.norm\.weight \(1 in all\) is float32 in the checkpoint and bfloat16 in Megatron: precision would be lost"
    refused(tmp_path, "convert", "roundtrip", folder, says=says)


def test_a_bfloat16_model_comes_home_in_its_own_bits(copy, tmp_path):
    """The undamaged one passes: it is the float32 tensor that was refused."""
    folder = copy(dtype=torch.bfloat16)
    ended = goldengate(tmp_path, "convert", "roundtrip", folder, "--target", tmp_path / "out")
    assert ended.code == 0, ended
    with Checkpoint.open(folder) as a, Checkpoint.open(tmp_path / "out") as b:
        assert same_bytes(a, b) == []
        assert b.tensors["model.norm.weight"].dtype == torch.bfloat16


def test_a_tied_model_with_another_head_on_disk_is_refused(copy, tmp_path):
    """transformers would silently take the embedding; which of the two is meant is not ours to guess."""
    folder = copy("llama3.2_tied")
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].roll(1, 0)}))
    says = r"lm_head\.weight differs from model\.embed_tokens\.weight, of which it should be a copy"
    for layout in ("tp2", "pp2"):
        refused(tmp_path, "convert", "roundtrip", folder, "--layout", layout, says=says)


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_a_tied_model_with_the_same_head_on_disk_comes_home_with_it(copy, tmp_path, layout):
    """Both tensors are exported again, bit for bit, also where they lie on two pipeline stages."""
    folder = copy("llama3.2_tied")
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    ended = goldengate(tmp_path, "convert", "roundtrip", folder, "--layout", layout, "--target", tmp_path / "out")
    assert ended.code == 0, ended
    with Checkpoint.open(folder) as a, Checkpoint.open(tmp_path / "out") as b:
        assert "lm_head.weight" in b.tensors
        assert same_bytes(a, b) == []


# Configs.

SHORT_LONGROPE = {  # a factor short: 16 values of a head are 8 pairs
    "rope_type": "longrope",
    "factor": 4.0,
    "short_factor": [1.0] * 7,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"hidden_act": "swoosh"}, r"LlamaForCausalLM cannot be built from this config: KeyError: 'swoosh'"),
        ({"hidden_act": "mish"}, r"activation 'mish' is not known; ACTIVATION_MAPPING has silu,"),
        ({"architectures": ["LlamaForCausalM"]}, r"LlamaForCausalM has no bridge; did you mean LlamaForCausalLM\?"),
        ({"architectures": ..., "model_type": "t5"}, r"names no architecture, and model type t5 has no bridge"),
        (
            {"is_causal": False, "vision_feature_layer": 3},
            r"config fields is_causal = False, vision_feature_layer = 3, which LlamaForCausalLM reads, are not known",
        ),
        ({"attention_bias": True}, r"model\.layers\.0\.self_attn\.o_proj\.bias is missing"),
        ({"mlp_bias": True}, r"mlp\.\w+_proj\.bias is missing"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"its weights are quantised \(fp8\), .*config\.json alone"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
            r"rope_type 'dynamic' .*not built; known: default, ",
        ),
        ({"rope_scaling": SHORT_LONGROPE}, r"LlamaForCausalLM cannot be built from this config: .*\[7\]"),
        ({"rope_scaling": {"rope_type": "llama3"}}, r"config\.json: .*low_freq_factor"),
        ({"num_attention_heads": 5}, r"config\.json: .*hidden size \(64\).* attention heads \(5\)"),
        ({"num_attention_heads": "4"}, r"config\.json: .*'num_attention_heads'.*str"),
        ({"torch_dtype": "float33"}, r"config\.json: .*float33"),
        ({"tie_word_embeddings": True}, r"lm_head\.weight differs from model\.embed_tokens\.weight"),
        ({"num_hidden_layers": 9}, r"model\.layers\.8\..* is missing"),
        ({"num_hidden_layers": 7}, r"tensor model\.layers\.7\..* is not used"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_config_that_is_not_accounted_for_is_refused(copy, tmp_path, fields, says):
    """The line names the field and its value, and what is known instead."""
    folder = copy()
    edit_config(folder, **fields)
    refused(tmp_path, "convert", "import", folder, tmp_path / "target", says=says)


CODE = """
from pathlib import Path
from transformers import LlamaConfig
(Path({folder!r}) / "it-ran").touch()
class ToyConfig(LlamaConfig):
    model_type = "toyllama"
"""


@pytest.fixture
def with_code(copy, tmp_path) -> Path:
    """A model type that transformers does not have, with code of its own, which leaves a mark when it runs."""
    folder = copy()
    edit_config(folder, model_type="toyllama", auto_map={"AutoConfig": "configuration_toy.ToyConfig"})
    (folder / "configuration_toy.py").write_text(CODE.format(folder=str(tmp_path)))
    return folder


@pytest.fixture
def own_modules(tmp_path_factory) -> Callable[[], None]:
    """transformers copies such code into a cache; here one of the test's own."""
    cache = str(tmp_path_factory.mktemp("modules"))

    def before() -> None:
        dynamic_module_utils.HF_MODULES_CACHE = cache

    return before


@pytest.mark.parametrize("answer", [(), ("--no-trust-remote-code",)])
def test_remote_code_does_not_run_without_permission(with_code, tmp_path, own_modules, answer):
    """The line names the model type and the way to permit it."""
    says = r"model ships its own code \(auto_map\) for model type 'toyllama'.* trust_remote_code=True"
    refused(tmp_path, "convert", "roundtrip", with_code, *answer, says=says, before=own_modules)
    assert not (tmp_path / "it-ran").exists()


def test_remote_code_runs_with_permission(with_code, tmp_path, own_modules):
    """On all ranks; the model converts like the family it names, and its code goes along with the export."""
    out = tmp_path / "out"
    args = ("convert", "roundtrip", with_code, "--trust-remote-code", "--layout", "tp2", "--target", out)
    ended = goldengate(tmp_path, *args, before=own_modules)
    assert ended.code == 0, ended
    assert (tmp_path / "it-ran").exists()
    assert (out / "configuration_toy.py").read_bytes() == (with_code / "configuration_toy.py").read_bytes()


def test_code_beside_a_model_that_transformers_knows_never_runs(with_code, tmp_path, own_modules):
    """`auto_map` is no reason to ask, nor to run anything."""
    edit_config(with_code, model_type="llama")
    ended = goldengate(tmp_path, "convert", "roundtrip", with_code, before=own_modules)
    assert ended.code == 0, ended
    assert not (tmp_path / "it-ran").exists()


# Layouts.


@pytest.mark.parametrize(
    ("row", "layout", "says"),
    [
        ("llama3", "tp3", r"4 attention heads cannot be divided by tp=3"),
        ("llama3", "pp16", r"8 layers cannot fill pp16 x vpp1 = 16 model chunks"),
        ("llama3", "pp2-split3.4", r"split 3\.4 holds 7 layers; the model has 8"),
        ("llama3", "ep2", r"ep2 asks for expert parallelism; the model has no experts"),
        ("mixtral", "ep3", r"8 experts cannot be divided by ep=3"),
        ("mixtral", "etp5", r"expert width 96 cannot be divided by etp=5"),
        ("llama3", "tp0", r"tp=0: a parallel size is at least 1"),
        ("llama3", "sp", r"sp needs tp > 1"),
        ("llama3", "tp2-tp4", r"'tp2-tp4': tp is given twice"),
        ("llama3", "banana", r"layout 'banana': cannot read 'banana'; write e\.g\. tp2-pp2"),
        ("llama3", "", r"layout '': cannot read ''"),
        ("llama3", "tp8-pp8-cp2", r"layout tp8-pp8-cp2 has 128 ranks; .* at most 64"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(good, tmp_path, row, layout, says):
    """The line says which number does not divide which, before a rank is forked or a file made."""
    args = ("convert", "import", good(row), tmp_path / "target", "--layout", layout)
    refused(tmp_path, *args, says=says, before=lambda: setattr(convert, "Ranks", None))


# Targets.


@pytest.fixture(scope="module")
def megatron(good, tmp_path_factory) -> Path:
    """A Megatron checkpoint of llama3, written at tp2."""
    target = tmp_path_factory.mktemp("megatron") / "llama3"
    ended = goldengate(target.parent, "convert", "import", good(), target, "--layout", "tp2")
    assert ended.code == 0, ended
    return target


def command(kind: str, good, megatron, target: Path) -> tuple:
    """A conversion from good folders to `target`, on two ranks."""
    return {
        "roundtrip": ("convert", kind, good(), "--target", target, "--layout", "tp2"),
        "import": ("convert", kind, good(), target, "--layout", "tp2"),
        "export": ("convert", kind, megatron, target, "--hf", good(), "--layout", "tp2"),
    }[kind]


KINDS = ["roundtrip", "import", "export"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_with_something_in_it_is_refused(good, megatron, tmp_path, kind):
    """Before anything is read; what is there stays."""
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine.txt").write_text("precious")
    args = command(kind, good, megatron, tmp_path / "target")
    refused(tmp_path, *args, says=r"target is not empty", before=lambda: setattr(convert, "Ranks", None))


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_whose_parent_is_missing_is_refused(good, megatron, tmp_path, kind):
    """No chain of folders is made for what may be a typing error."""
    args = command(kind, good, megatron, tmp_path / "nowhere" / "target")
    says = r"nowhere is not a folder: make it before writing target"
    refused(tmp_path, *args, says=says, before=lambda: setattr(convert, "Ranks", None))


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_target_is_taken_and_one_that_is_missing_made(good, megatron, tmp_path, kind):
    """The same commands with a good target succeed, and leave nothing beside it."""
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        ended = goldengate(tmp_path, *command(kind, good, megatron, tmp_path / name))
        assert ended.code == 0, ended
        assert [text for text in ended.err if text.startswith("goldengate:")] == []
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "new"}
    assert sorted(state(tmp_path / "new")) == sorted(state(tmp_path / "empty"))
    if kind != "import":
        with Checkpoint.open(good()) as a, Checkpoint.open(tmp_path / "new") as b:
            assert same_bytes(a, b) == []


@pytest.mark.parametrize("kind", ["roundtrip", "import", "export"])
def test_a_source_that_is_not_there_is_refused(good, megatron, tmp_path, kind):
    """Named as it was given."""
    missing = tmp_path / "nowhere" / "model"
    args = {
        "roundtrip": (missing,),
        "import": (missing, tmp_path / "target"),
        "export": (missing, tmp_path / "target", "--hf", good()),
    }[kind]
    refused(tmp_path, "convert", kind, *args, says=r"nowhere/model is n(ot|either) a folder")


@pytest.mark.parametrize("row", ["qwen2", "llama3.2_tied", "mixtral"])
def test_a_megatron_checkpoint_of_another_model_is_refused(good, megatron, tmp_path, row):
    """The line names the checkpoint and the first tensor that is missing or of another shape, or what is another in the
    config where the folder has one."""
    args = ("convert", "export", megatron, tmp_path / "target", "--hf", good(row))
    refused(tmp_path, *args, says=r"llama3 is of another model than \S+: ")
    alone = shutil.copytree(megatron / "iter_0000000", tmp_path / "alone")
    args = ("convert", "export", alone, tmp_path / "target", "--hf", good(row))
    refused(tmp_path, *args, says=r"cannot load \S+/alone as this model: .*decoder\.layers\.")


def test_a_megatron_checkpoint_of_more_than_the_model_is_refused(good, copy, tmp_path):
    """Its heads would be lost without a word, when the reference is the model without them."""
    row, source, target = "mimo_7b", tmp_path / "megatron", tmp_path / "target"
    assert goldengate(tmp_path, "convert", "import", good(row), source, "--layout", "tp2").code == 0
    folder = copy(row)
    edit_config(folder, num_nextn_predict_layers=0)
    edit_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "mtp" in name])
    args = ("convert", "export", source, target, "--hf", folder, "--layout", "tp2")
    refused(tmp_path, *args, says=r"megatron is of another model than \S+: mtp_num_layers")
    (source / "goldengate_outline.json").unlink()
    refused(tmp_path, *args, says=r"as this model, which has no place for mtp\.layers\..* \(and \d+ more\)")


def test_a_stock_checkpoint_of_gated_delta_nets_is_refused(good, tmp_path):
    """Its inner norms hold gamma - 1 as out_norm.weight, where ours hold gamma."""
    sharded_state, row = convert._sharded_state, "qwen3_next"

    def before() -> None:
        def stock():
            state = sharded_state()
            for tensors in state.values():
                for tensor in tensors.values():
                    tensor.key = tensor.key.replace("out_norm.gamma", "out_norm.weight")
            return state

        convert._sharded_state = stock

    source, target = tmp_path / "megatron", tmp_path / "target"
    assert goldengate(tmp_path, "convert", "import", good(row), source, before=before).code == 0
    args = ("convert", "export", source, target, "--hf", good(row))
    refused(tmp_path, *args, says=r"cannot load \S+/iter_0000000 as this model: .*out_norm\.gamma")


def test_what_training_keeps_beside_the_weights_is_left_alone(good, tmp_path):
    """The optimizer's tensors, of which no Hugging Face folder knows."""
    from megatron.core.dist_checkpointing import ShardedTensor

    sharded_state = convert._sharded_state

    def before() -> None:
        moment = ShardedTensor.from_rank_offsets("optimizer.state.exp_avg.embedding", torch.ones(4))
        convert._sharded_state = lambda: {**sharded_state(), "optimizer": moment}

    source, target = tmp_path / "megatron", tmp_path / "target"
    assert goldengate(tmp_path, "convert", "import", good(), source, before=before).code == 0
    ended = goldengate(tmp_path, "convert", "export", source, target, "--hf", good())
    assert ended.code == 0, ended
    with Checkpoint.open(good()) as a, Checkpoint.open(target) as b:
        assert same_bytes(a, b) == []


def test_a_folder_that_is_no_megatron_checkpoint_is_refused(good, tmp_path):
    """An empty folder, say."""
    (tmp_path / "empty").mkdir()
    args = ("convert", "export", tmp_path / "empty", tmp_path / "target", "--hf", good())
    refused(tmp_path, *args, says=r"empty is not a distributed checkpoint")


# A disk that is full, a rank that dies.


def no_space(*_) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("kind", ["roundtrip", "export"])
@pytest.mark.parametrize("existed", [False, True])
def test_a_full_disk_is_said_and_leaves_nothing(good, megatron, tmp_path, kind, existed):
    """Space is reserved before the first byte is written; a target that was there is empty again, else it is gone."""
    if existed:
        (tmp_path / "target").mkdir()
    says = r"cannot reserve \d+ bytes in \S+/target: No space left on device, \d+ bytes are free"
    args = command(kind, good, megatron, tmp_path / "target")
    refused(tmp_path, *args, says=says, before=lambda: setattr(os, "posix_fallocate", no_space))


def test_an_import_that_the_disk_has_no_room_for_is_refused(good, megatron, tmp_path):
    """Megatron writes its files one by one; so the sum is compared with what is free before the first."""

    def before() -> None:
        usage = shutil.disk_usage(tmp_path)
        shutil.disk_usage = lambda _: usage._replace(free=1000)

    args = command("import", good, megatron, tmp_path / "target")
    refused(tmp_path, *args, says=r"target takes \d+ bytes, 1000 are free", before=before)


def kill(rank: int) -> None:
    if torch.distributed.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_in_the_middle_leaves_nothing(good, megatron, tmp_path, kind, rank):
    """Rank 0, which would tidy up, as well as another; while there are files with temporary names."""

    def before() -> None:
        seen, count, sharded_state = [], convert._count, convert._sharded_state

        def count_and_kill(name: str) -> None:
            seen.append(name)
            if len(seen) == (51 + 25 if kind == "roundtrip" else 25):  # of 51 tensors, which roundtrip imports first
                assert any((tmp_path / "target").glob(".*.partial"))
                kill(rank)
            count(name)

        def kill_before_saving():
            assert (tmp_path / ".target.partial").is_dir()
            kill(rank)
            return sharded_state()

        if kind == "import":
            convert._sharded_state = kill_before_saving
        else:
            convert._count = count_and_kill

    args = command(kind, good, megatron, tmp_path / "target")
    refused(tmp_path, *args, says=rf"goldengate: rank {rank} was killed by signal 9", before=before)


# What is right in form and wrong in substance: exit code 1.


def test_a_round_trip_that_changes_a_value_ends_with_1_and_says_which(good, tmp_path):
    """One element of one tensor."""

    def before() -> None:
        right = AutoBridge.load_hf_weights

        def load(self, model, *args, **options):
            right(self, model, *args, **options)
            with torch.no_grad():
                model[0].decoder.final_layernorm.weight[3] += 1

        AutoBridge.load_hf_weights = load

    report = tmp_path / "report.json"
    ended = goldengate(tmp_path, "convert", "roundtrip", good(), "--json", report, before=before)
    assert ended.code == 1, ended
    assert ended.err[-1].startswith("DIFFERS  model.norm.weight: 1 of 64 elements differ, first at [3]: ")
    assert len(json.loads(report.read_text())["differences"]) == 1


def test_verify_ends_with_1_for_a_wrong_golden_and_0_for_the_right_one(tmp_path):
    """And prints what failed."""

    def wrong() -> None:
        golden = goldens.load("llama3")
        golden.tensors["logits"] = golden.logits.roll(1, -1)
        goldens.load = lambda row: golden

    args = ("verify", "llama3", "--layouts", "tp1", "--checks", "logits")
    assert goldengate(tmp_path, *args).code == 0
    ended = goldengate(tmp_path, *args, before=wrong)
    assert ended.code == 1, ended
    assert re.search(r"FAIL.*llama3.*tp1.*logits|llama3.*FAIL", ended.out)


def test_verify_ends_with_1_when_the_only_layout_asked_for_cannot_be(tmp_path):
    """A skip is no evidence; its reason is printed."""
    ended = goldengate(tmp_path, "verify", "llama3", "--layouts", "tp3")
    assert ended.code == 1, ended
    assert "4 attention heads cannot be divided by tp=3" in ended.out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("verify", "lama3"), r"no toy row 'lama3'; nearest: llama3"),
        (("verify", "llama3", "--checks", "logit"), r"check 'logit' is not known; checks are config, complete"),
        (("verify", "llama3", "--layouts", "tpp"), r"layout 'tpp': cannot read 'tpp'"),
        (("golden", "regen", "lama3", "--reason", "x"), r"no toy row 'lama3'"),
        (("golden", "regen", "llama3", "--reason", " "), r"row llama3: a golden needs a reason"),
    ],
)
def test_a_name_that_is_not_known_is_refused(tmp_path, args, says):
    """With the nearest that is."""
    refused(tmp_path, *args, says=says)


def test_goldens_that_are_missing_or_have_no_row_are_refused(tmp_path):
    """A golden that nothing uses is as wrong as one that is not there."""

    def elsewhere() -> None:
        goldens.FOLDER = tmp_path

    remedy = r'golden regen llama3 --reason "\.\.\."'
    refused(tmp_path, "verify", "llama3", says=rf"row llama3 has no golden; .*{remedy}", before=elsewhere)
    (tmp_path / "ghost.safetensors").touch()
    refused(tmp_path, "verify", says=r"golden ghost has no row: delete", before=elsewhere)


def test_a_fresh_interpreter_says_the_same(copy, tmp_path):
    """The console script itself, from a shell; also where a CUDA compiler is and no GPU, of which torch warns."""
    folder = copy()
    cut(folder, -100)
    script = Path(sys.executable).with_name("goldengate")
    ended = subprocess.run(
        [script, "convert", "import", folder, tmp_path / "target"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "CUDA_HOME": str(tmp_path)},
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert re.fullmatch(r"goldengate: \S+/model\.safetensors is truncated: 100 of .*\n", ended.stderr)
    assert not (tmp_path / "target").exists()
