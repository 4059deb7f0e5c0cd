"""Any field of any type gives one line that names it; no size makes it loop; a golden's limits follow from its noise (attacks
10, 11, 16)."""

import copy
import json
import random
import shutil
import time

import pytest

import toy_models
from bridges import AutoBridge, Layout
from bridges.errors import GoldengateError
from bridges.hf_pretrained import PreTrainedCausalLM, load_config
from bridges.model_bridge import ConfigError
from harness.reference import goldens

ROWS = ("llama3", "qwen3_moe", "deepseek_v3", "qwen3_next", "gemma2", "phi3")  # of different mechanisms
VALUES = (None, "x", "", -1, 0, 3, 2**31, 1e30, float("nan"), [], {}, [1], {"a": 1}, True, 1.5, "7")


def provider(raw: dict, folder):
    config = load_config(copy.deepcopy(raw), folder, False)
    made = AutoBridge(PreTrainedCausalLM(config, raw)).to_megatron_provider(load_weights=False)
    made.apply_layout(Layout(tp=2)).check_layout()
    return made.finalize()


def refusal(raw: dict, folder) -> str:
    """What is said of a config, "" when it makes a model; any other exception is a failure."""
    try:
        provider(raw, folder)
    except GoldengateError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("seed", range(2))
def test_attack_11_a_mutated_config_is_a_model_or_one_line(tmp_path, seed):
    """94 of 2,059 mutations were tracebacks. The whole count is that of --faults."""
    draw = random.Random(seed)
    for _ in range(12):
        row = draw.choice(ROWS)
        raw = copy.deepcopy(toy_models.config_dict(row))
        name, value = draw.choice(sorted(raw)), draw.choice(VALUES)
        raw[name] = value
        said = refusal(raw, tmp_path)
        assert len(said.splitlines()) <= 1, (row, name, value)


def test_attack_11_a_count_that_is_a_list_is_named(tmp_path):
    raw = copy.deepcopy(toy_models.config_dict("deepseek_v3"))
    raw["num_nextn_predict_layers"] = [1]
    with pytest.raises(GoldengateError, match=r"mtp_num_layers is \[1\]: whole numbers are needed"):
        provider(raw, tmp_path)


@pytest.mark.parametrize("error", [TypeError, KeyError, ZeroDivisionError, AssertionError, AttributeError, MemoryError])
def test_attack_11_what_a_bridge_trips_over_is_one_line(tmp_path, monkeypatch, error):
    raw = toy_models.config_dict("llama3")
    bridge = AutoBridge(PreTrainedCausalLM(load_config(raw, tmp_path, False), raw))

    def trips(_pretrained):
        raise error("head_dim\nand more")

    monkeypatch.setattr(bridge._model_bridge, "provider_bridge", trips)
    with pytest.raises(
        ConfigError, match=rf"no model can be made of this config \({error.__name__}: .*head_dim"
    ) as seen:
        bridge.to_megatron_provider()
    assert len(str(seen.value).splitlines()) == 1


@pytest.mark.parametrize("model_type", ["lama", "", 0, None, False, 2**31])
def test_attack_11_a_damaged_model_type_is_refused(tmp_path, model_type):
    """The config class's defaults were silently dropped: rms_norm_eps 1e-5 for 1e-6."""
    raw = {**toy_models.config_dict("llama3"), "model_type": model_type}
    with pytest.raises(ConfigError, match="model_type"):
        load_config(raw, tmp_path, False)


@pytest.mark.parametrize(
    "name", ["num_hidden_layers", "hidden_size", "rope_parameters.factor", "max_position_embeddings"]
)
def test_attack_10_sizes_that_no_machine_has_are_refused_at_once(tmp_path, name):
    """2**31 layers: config classes make a list as long as that."""
    raw = copy.deepcopy(toy_models.config_dict("qwen3_next"))
    place = raw
    *above, last = name.split(".")
    for part in above:
        place = place.setdefault(part, {})
    place[last] = 2**31
    start = time.monotonic()
    with pytest.raises(ConfigError, match=rf"{name} is 2\.14748e\+09, over"):
        load_config(raw, tmp_path, False)
    assert time.monotonic() - start < 1


@pytest.fixture
def golden(tmp_path, monkeypatch):
    """A copy of llama3's golden whose provenance a test may damage."""
    shutil.copy(goldens.FOLDER / "llama3.safetensors", tmp_path)
    monkeypatch.setattr(goldens, "FOLDER", tmp_path)
    stock = goldens.load("llama3")

    def damaged(change) -> None:
        provenance = json.loads(json.dumps(stock.provenance))
        change(provenance)
        made = goldens.Golden("llama3", stock.tensors, provenance)
        (tmp_path / "llama3.safetensors").write_bytes(goldens.to_bytes(made))

    return damaged


@pytest.mark.parametrize("name", ["gate", "gradient_gate"])
def test_attack_16_a_limit_that_does_not_follow_from_the_noise_is_refused(golden, name):
    """A bit flipped in `gate` made it 1.0001, with which anything passes."""
    golden(lambda p: p.update({name: 1.0001}))
    with pytest.raises(ValueError, match=rf"{name} is 1\.0001, and 0\.0001 follows from the noise"):
        goldens.load("llama3")


def test_attack_16_every_damaged_entry_is_one_line(golden):
    """22 of them were KeyErrors."""
    names = json.loads(json.dumps(goldens.load("llama3").provenance))
    for name in names:
        golden(lambda p, name=name: p.pop(name))
        with pytest.raises(ValueError, match=r"is no golden|do not match") as caught:
            goldens.load("llama3")
        assert len(str(caught.value).splitlines()) == 1
        golden(lambda p, name=name: p.update({name: [None]}))
        with pytest.raises(ValueError, match=r"is no golden|do not match"):
            goldens.load("llama3")
