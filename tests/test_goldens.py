"""Goldens: present, fresh, reproducible; and everything that is wrong with one is an error that says so."""

import json
import shutil
from importlib.metadata import version

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import toy_models
from harness.reference import goldens
from harness.reference.compare import relative_rms
from harness.reference.gradients import PROJECTIONS
from tests.bounds import of_gradients, of_row, roundings
from toy_models import catalogue

ROWS = toy_models.rows()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Goldens and rows in a folder of the test's own: qwen2 and its golden, as if made with the libraries of today."""
    (tmp_path / "rows").mkdir()
    shutil.copy(catalogue.ROWS / "qwen2.json", tmp_path / "rows")
    shutil.copy(goldens.path("qwen2"), tmp_path)
    monkeypatch.setattr(catalogue, "ROWS", tmp_path / "rows")
    monkeypatch.setattr(goldens, "FOLDER", tmp_path)
    catalogue._read.cache_clear()
    rewrite(versions={library: version(library) for library in goldens.LIBRARIES})
    yield tmp_path
    catalogue._read.cache_clear()


def change_config(folder, **changes):
    file = folder / "rows" / "qwen2.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    catalogue._read.cache_clear()


def rewrite(tensors=None, **provenance):
    """The golden of qwen2 with other tensors or provenance entries, as a person with an editor leaves it."""
    golden = goldens.load("qwen2")
    content = json.dumps(golden.provenance | provenance)
    save_file(golden.tensors | (tensors or {}), goldens.path("qwen2"), {"provenance": content})


def fresh(row: str) -> str | None:
    config_hash = goldens.hash_config(toy_models.golden_key(row))
    return goldens.check_fresh(row, config_hash, toy_models.weights_hash(toy_models.build(row)))


# The goldens of this repository


def test_every_row_has_a_golden_and_every_golden_a_row():
    assert goldens.missing() == []
    assert goldens.orphans() == []
    assert goldens.list_goldens() == ROWS


@pytest.mark.parametrize("row", ROWS)
def test_the_golden_is_fresh_small_and_says_where_it_comes_from(row):
    """Its hashes are those of the row's config and weights; its gate is 1e-4 or ten times the noise."""
    golden = goldens.load(row)
    assert fresh(row) is None
    assert goldens.path(row).stat().st_size <= 200 * 1024
    assert torch.equal(golden.inputs, toy_models.inputs(row))
    assert golden.logits.shape == (4, 24, toy_models.config_dict(row)["vocab_size"])
    assert golden.logits.dtype == torch.float32
    assert golden.provenance["row"] == row
    assert golden.provenance["reason"]
    assert golden.provenance["command"].startswith(f"goldengate golden regen {row} --reason ")
    assert golden.provenance["versions"].keys() == {"goldengate", "numpy", "torch", "transformers"}
    assert golden.gate == max(1e-4, 10 * max(golden.provenance["noise"].values()))
    assert golden.gradient_gate == max(1e-4, float(f"{10 * golden.provenance['gradient_noise']:.2e}")) <= 1e-3
    assert golden.tensors["gradients"].shape[0] > 50
    assert golden.tensors["gradients"].shape[1:] == (1 + PROJECTIONS,)
    with safe_open(goldens.path(row), "pt") as file:
        assert file.metadata().keys() == {"provenance"}, "several keys are not stable byte for byte"


@pytest.mark.parametrize("row", ["llama3.1_ropescale", "qwen3_moe_raw-square"])
def test_transformers_still_gives_the_golden(row):
    drift = goldens.diff(row)
    assert drift.value < of_row(row)
    assert not {"config", "weights", "inputs"} & set(drift.changed)


# Making them


def test_regenerating_changes_no_byte_and_says_so(folder):
    """Same machine, same reason: the file holds no date, no path and no other accident."""
    goldens.regen("qwen2", "it's new")
    before = goldens.path("qwen2").read_bytes()
    drift = goldens.regen("qwen2", "it's new")
    assert (drift.value, drift.changed) == (0.0, ())
    assert goldens.path("qwen2").read_bytes() == before
    assert str(folder).encode() not in before
    assert {file.name for file in folder.iterdir()} == {"rows", "qwen2.safetensors"}
    assert goldens.load("qwen2").provenance["reason"] == "it's new"


def test_a_first_golden_has_no_drift(folder):
    goldens.path("qwen2").unlink()
    drift = goldens.regen("qwen2", "first")
    assert drift.value is None
    assert str(drift) == "qwen2: new golden"
    assert fresh("qwen2") is None


def test_diff_measures_and_leaves_the_file_alone(folder):
    """A changed epsilon drifts the logits; diff names the cause, regen repeats it and then all is quiet."""
    before = goldens.path("qwen2").read_bytes()
    change_config(folder, rms_norm_eps=0.5)
    drift = goldens.diff("qwen2")
    assert drift.value > 1e-2
    assert drift.changed == ("config",)
    assert goldens.path("qwen2").read_bytes() == before
    assert goldens.regen("qwen2", "another epsilon") == drift
    assert goldens.diff("qwen2") == goldens.Drift("qwen2", 0.0, ())


def test_another_vocabulary_is_an_infinite_drift(folder):
    change_config(folder, vocab_size=137)
    drift = goldens.diff("qwen2")
    assert drift.value == float("inf")
    assert drift.changed == ("config", "weights", "inputs")


def test_a_new_library_version_is_named(folder):
    rewrite(versions=goldens.load("qwen2").provenance["versions"] | {"torch": "1.0"})
    (changed,) = goldens.diff("qwen2").changed
    assert changed.startswith("torch 1.0 -> 2.")


@pytest.mark.parametrize("reason", ["", "  \n"])
def test_an_empty_reason_is_refused(folder, reason):
    before = goldens.path("qwen2").read_bytes()
    with pytest.raises(ValueError, match=r'needs a reason.*goldengate golden regen qwen2 --reason "..."'):
        goldens.regen("qwen2", reason)
    assert goldens.path("qwen2").read_bytes() == before


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (
            {"attn_implementation": "sdpa"},
            "eager and sdpa attention differ by 0.*neither can be the reference",
        ),
        (
            {"dtype": torch.float64},
            "fp32 and in fp64 differ by 0.*_inputs_seed in toy_models/rows/qwen2.json",
        ),
    ],
)
def test_a_golden_is_refused_while_the_reference_is_in_doubt(folder, monkeypatch, condition, message):
    """Two implementations of one model disagree by more than any rounding."""
    build = toy_models.build

    def broken(row, **options):
        model = build(row, **options)
        if options == condition:
            model.model.layers[3].self_attn.v_proj.weight.data *= 1.01
        return model

    monkeypatch.setattr(toy_models, "build", broken)
    before = goldens.path("qwen2").read_bytes()
    with pytest.raises(ValueError, match=message):
        goldens.regen("qwen2", "sdpa is broken")
    assert goldens.path("qwen2").read_bytes() == before


def test_a_golden_is_refused_while_its_gradients_are_noise(folder, monkeypatch):
    """No gate of 1e-3 can be ten times the noise: the inputs are ill-chosen."""
    monkeypatch.setattr(goldens, "worst_difference", lambda actual, expected: 1.01e-4)
    with pytest.raises(ValueError, match=r"gradients in fp32 and in fp64 differ by 0\.000101.*_inputs_seed"):
        goldens.regen("qwen2", "reason")


def test_the_gate_of_gradients_follows_their_noise(folder, monkeypatch):
    """Worst tensor against fp64; ten times that, at least 1e-4."""
    assert goldens.load("qwen2").gradient_gate == 1e-4
    seen = []

    def noisy(actual, expected):
        assert {actual[n].dtype for n in actual} == {torch.float32}
        assert {expected[n].dtype for n in expected} == {torch.float64}
        seen.append(relative_rms(actual["lm_head.weight"], expected["lm_head.weight"]))
        return 5e-5

    monkeypatch.setattr(goldens, "worst_difference", noisy)
    assert goldens.compute("qwen2", "reason", "command").gradient_gate == 5e-4
    assert roundings(steps=0.1) < seen[0] < of_gradients("qwen2")


def test_the_gate_follows_a_noisy_row(folder, monkeypatch):
    """Noise of 3e-5 is allowed, and lifts the gate to ten times itself."""
    build = toy_models.build

    def noisy(row, **options):
        model = build(row, **options)
        if options.get("attn_implementation") == "sdpa":
            model.lm_head.weight.data *= 1 + 3e-5
        return model

    monkeypatch.setattr(toy_models, "build", noisy)
    golden = goldens.compute("qwen2", "reason", "command")
    own = goldens.load("qwen2").provenance["noise"]["eager_vs_sdpa"]
    assert golden.provenance["noise"]["eager_vs_sdpa"] == pytest.approx(3e-5, abs=2 * own)
    assert golden.gate == 10 * golden.provenance["noise"]["eager_vs_sdpa"]


@pytest.mark.parametrize("row", ["llama3.1_ropescale", "qwen3_moe", "phi3"])
def test_the_exact_reference_computes_nothing_in_float32(row):
    """Else it would share float32's rounding and the noise would look too small.

    The only float32 values are the weights that the generator gives.
    """
    single = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                single.append(func)
            return out

    with goldens._Double():
        model = toy_models.build(row, dtype=torch.float64)
        with Watch(), torch.no_grad():
            exact = model(toy_models.inputs(row), use_cache=False).logits
    assert not single
    assert exact.dtype == torch.float64
    assert roundings(steps=1) < relative_rms(goldens.load(row).logits, exact) < of_row(row)


# Wrong goldens


def test_a_missing_golden_says_how_to_make_it(folder):
    goldens.path("qwen2").unlink()
    with pytest.raises(ValueError, match="make it with: goldengate golden regen qwen2 --reason"):
        goldens.load("qwen2")
    assert goldens.missing() == ["qwen2"]
    assert goldens.list_goldens() == []


def test_an_unknown_row_is_no_missing_golden(folder):
    with pytest.raises(ValueError, match="no toy row 'qwen'; nearest: qwen2"):
        goldens.load("qwen")


def test_an_orphan_is_found(folder):
    shutil.copy(goldens.path("qwen2"), goldens.path("qwen1.5"))
    assert goldens.orphans() == ["qwen1.5"]


def test_a_tampered_tensor_is_refused(folder):
    """One unit in the last place of one logit; and an added or replaced tensor."""
    limit = of_row("qwen2")
    logits = goldens.load("qwen2").logits.clone()
    logits[3, 23, 130] = torch.nextafter(logits[3, 23, 130], torch.tensor(9e9))
    rewrite({"logits": logits})
    with pytest.raises(ValueError, match=r"do not match the hash.*goldengate golden regen qwen2"):
        goldens.load("qwen2")
    assert 0 < goldens.diff("qwen2").value < limit, "diff and regen still work, to repair it"
    goldens.regen("qwen2", "repair")
    rewrite({"more": torch.ones(1)})
    with pytest.raises(ValueError, match="do not match the hash"):
        goldens.load("qwen2")


def test_further_tensors_need_no_other_format(folder):
    """MTP logits are more keys, under the same hash."""
    more = goldens.load("qwen2").tensors | {"mtp.0.logits": torch.ones(4, 23, 131)}
    rewrite(more, tensors_hash=toy_models.weights_hash(more))
    assert goldens.load("qwen2").tensors.keys() == {"inputs", "logits", "gradients", "mtp.0.logits"}


@pytest.mark.parametrize("content", [b"", b"not a safetensors file", b"\x02\0\0\0\0\0\0\0{}"])
def test_a_file_that_is_no_golden_is_an_error_with_a_way_out(folder, content):
    goldens.path("qwen2").write_bytes(content)
    with pytest.raises(ValueError, match=r"qwen2.safetensors is no golden .*delete it, then: goldengate"):
        goldens.load("qwen2")


def test_a_stale_golden_says_what_changed(folder):
    assert fresh("qwen2") is None
    config_hash = goldens.load("qwen2").provenance["config_hash"]
    assert "from another weights;" in goldens.check_fresh("qwen2", config_hash, "0")
    assert "from another config and other weights;" in goldens.check_fresh("qwen2", "0", "0")
    change_config(folder, rms_norm_eps=1e-6)
    assert "from another config;" in fresh("qwen2")
    assert "goldengate golden regen qwen2" in fresh("qwen2")


def test_a_config_hash_does_not_depend_on_the_order_of_keys():
    assert goldens.hash_config({"a": 1, "b": [1, 2]}) == goldens.hash_config({"b": [1, 2], "a": 1})
    assert goldens.hash_config({"a": 1, "b": [1, 2]}) != goldens.hash_config({"a": 1, "b": [2, 1]})
    assert goldens.hash_config({"a": None}) != goldens.hash_config({})
