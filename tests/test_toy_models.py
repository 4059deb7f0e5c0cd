"""Toy models: configs that arrive, weights that are distinct and reproducible, published checkpoints."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import toy_models
from harness.reference.compare import relative_rms
from toy_models import catalogue, checkpoint
from toy_models.randomise import kind_of, named_tensors, random_blocks
from toy_models.reference import native_config, publish, restore

ROWS = toy_models.rows()
MOE_ROWS = [row for row in ROWS if {"num_experts_per_tok", "moe_k"} & toy_models.config_dict(row).keys()]
GATE = 1e-4


def logits(model: nn.Module, row: str) -> torch.Tensor:
    with torch.no_grad():
        return model(toy_models.inputs(row), use_cache=False).logits


def build_changed(row: str, **changes) -> nn.Module:
    """The row's model after changes to its config.json."""
    config = {**toy_models.config_dict(row), **changes}
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[config["model_type"]].from_dict(config),
        attn_implementation="eager",
        experts_implementation="eager",
    )
    toy_models.randomise(model)
    return model.eval()


def read_folder(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


# Rows and configs


def test_rows_are_sorted_with_each_base_before_its_twin():
    assert sorted(ROWS) == ROWS
    assert ROWS.index("qwen3_moe") < ROWS.index("qwen3_moe-square") < ROWS.index("qwen3_moe_raw")


def test_a_twin_is_its_base_with_square_experts():
    """Expert matrices [64, 64]: a transposition or a guessed orientation is no error of shape there."""
    for row in MOE_ROWS:
        config = toy_models.config_dict(row)
        ffn = config["moe_intermediate_size" if "moe_intermediate_size" in config else "intermediate_size"]
        assert (ffn == config["hidden_size"]) == row.endswith("-square")
        base = toy_models.config_dict(row.removesuffix("-square"))
        assert config.keys() == base.keys()
        assert len([key for key in base if base[key] != config[key]]) == row.endswith("-square")


def test_an_unknown_row_names_the_nearest():
    with pytest.raises(ValueError, match="no toy row 'qwen3moe'; nearest: qwen3_moe"):
        toy_models.config_dict("qwen3moe")


def test_a_config_is_a_copy_without_our_own_keys():
    config = toy_models.config_dict("qwen3_moe-square")
    assert not [key for key in config if key.startswith("_")]
    config["mlp_only_layers"].append(3)
    assert toy_models.config_dict("qwen3_moe-square")["mlp_only_layers"] == []


@pytest.mark.parametrize("row", ROWS)
def test_the_hub_config_arrives_in_transformers(row):
    """Every key that transformers keeps has config.json's value; rope keys arrive in rope_parameters. Where transformers
    has no such class, they arrive under the names of the class that stands for it."""
    published, config = toy_models.config_dict(row), toy_models.hf_config(row)
    hub = native_config(toy_models.reference_of(row), published)
    theta = {"rope_theta": hub["rope_theta"]} if "rope_theta" in hub else hub["rope_parameters"]
    rope = {"rope_type": "default", **theta, **(hub.get("rope_scaling") or {})}
    rope |= {key: hub[key] for key in ["partial_rotary_factor"] if key in hub}
    if "type" in rope:  # as rope_type was called
        rope["rope_type"] = rope["type"]
    if rope["rope_type"] == "longrope":
        rope["original_max_position_embeddings"] = hub["original_max_position_embeddings"]
    # With a table for each type of layer, scaling is about layers without a window.
    of_all = config.rope_parameters.get("full_attention", config.rope_parameters)
    assert of_all == rope
    if of_all is not config.rope_parameters:
        local = hub.get("rope_local_base_freq", type(config).default_theta)
        assert config.rope_parameters["sliding_attention"] == {"rope_type": "default", "rope_theta": local}
    derived = {"rope_theta", "rope_scaling", "torch_dtype", "transformers_version", "partial_rotary_factor"}
    derived |= {"rope_local_base_freq"}
    if isinstance(every := hub.get("sliding_window_pattern"), int):
        derived.add("sliding_window_pattern")
        assert [t == "full_attention" for t in config.layer_types] == [(i + 1) % every == 0 for i in range(8)]
    if hub.get("use_sliding_window") is False:
        derived |= {"sliding_window", "use_sliding_window"}  # Qwen publishes a window beside use_sliding_window: false
        assert not getattr(config, "use_sliding_window", False)
        assert not getattr(config, "sliding_window", None)
    if "full_attention_interval" in hub and "layer_types" not in hub:
        derived.add("full_attention_interval")  # transformers writes it out as layer_types
        every = hub["full_attention_interval"]
        assert [t == "full_attention" for t in config.layer_types] == [(i + 1) % every == 0 for i in range(8)]
    for key in hub.keys() - derived:
        assert getattr(config, key) == hub[key], key
    built = type(toy_models.build(row)).__name__
    assert built == toy_models.reference_class(row)
    assert (built == hub["architectures"][0]) or toy_models.reference_of(row)


@pytest.mark.parametrize("row", ROWS)
def test_toys_have_no_dropout_and_ids_within_the_vocabulary(row):
    config = toy_models.config_dict(row)
    assert config["num_hidden_layers"] == 8
    assert not [key for key in config if ("dropout" in key or "pdrop" in key) and config[key] != 0]
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert np.max(config.get(key, 0)) < config["vocab_size"]


def test_rows_differ_in_their_norm_epsilon_and_rope_base():
    """A value taken from another row, or a default, is never right by luck."""
    bases = [toy_models.config_dict(row) for row in ROWS if not row.endswith("-square")]
    names = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "norm_epsilon", "layer_norm_epsilon")
    assert len({config[name] for config in bases for name in names if name in config}) == len(bases)
    thetas = {{**config, **config.get("rope_parameters", {})}["rope_theta"] for config in bases}
    assert len(thetas) == len(bases)


@pytest.mark.parametrize(
    ("row", "change"),
    [
        ("llama3", {"rms_norm_eps": 1e-6}),
        ("llama3", {"rope_theta": 10000.0}),
        ("llama3.1_ropescale", {"rope_scaling": None}),
        ("llama3.2_tied", {"rope_scaling.original_max_position_embeddings": 8192}),
        ("llama3.2_tied", {"rope_scaling.low_freq_factor": 1.0}),
        ("llama3.2_tied", {"rope_scaling.high_freq_factor": 4.0}),
        ("llama3.2_tied", {"rope_scaling.factor": 8.0}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 9}),
        ("phi3", {"partial_rotary_factor": 1.0}),
        ("phi3", {"sliding_window": 13}),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 0, 1, 1, 1, 0]}),
        ("mixtral", {"num_experts_per_tok": 3}),
        ("qwen2_moe", {"norm_topk_prob": True}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("qwen2", {"hidden_act": "gelu"}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_a_config_value_that_is_lost_shows_in_the_logits(row, change):
    """The toy is sensitive to the flag: the wrong value moves the logits by more than the gate."""
    ((key, value),) = change.items()
    if "." in key:
        key, inner = key.split(".")
        value = {**toy_models.config_dict(row)[key], inner: value}
    assert relative_rms(logits(build_changed(row, **{key: value}), row), logits(build_changed(row), row)) > GATE


# Inputs


def test_inputs_are_pinned_distinct_between_rows_and_longer_than_every_window():
    assert toy_models.inputs("llama3")[0, :6].tolist() == [121, 73, 34, 84, 94, 65]
    assert len({tuple(toy_models.inputs(row).flatten().tolist()) for row in ROWS}) == len(ROWS)
    for row in ROWS:
        ids, config = toy_models.inputs(row), toy_models.config_dict(row)
        assert ids.shape == (4, 24)
        assert ids.dtype == torch.int64
        assert ids.min() >= 0
        assert ids.max() < config["vocab_size"]
        assert (config.get("sliding_window") or 0) < 24
        assert config.get("pad_token_id") not in ids.flatten().tolist()


def choice_of(router: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, float]:
    """(scores [tokens, experts] by which the router chooses, -inf outside the chosen groups; the smallest margin between
    the last chosen group and the next)."""
    scores = nn.functional.linear(hidden.flatten(0, -2), router.weight)
    if statics := getattr(router, "moe_statics", None):
        scores = scores.softmax(-1) + statics.e_score_correction_bias
    elif hasattr(router, "e_score_correction_bias"):
        scores = scores.sigmoid() + router.e_score_correction_bias
    groups = getattr(router, "num_group", None) or 1
    if groups == 1:
        return scores, torch.inf
    grouped = scores.unflatten(-1, (groups, -1))
    best = 1 if getattr(router, "topk_method", None) == "group_limited_greedy" else 2
    values, order = grouped.topk(best).values.sum(-1).sort(-1, descending=True)
    others = torch.zeros_like(values, dtype=torch.bool).scatter(-1, order[:, router.topk_group :], True)
    margin = (values[:, router.topk_group - 1] - values[:, router.topk_group]).min().item()
    return grouped.masked_fill(others.unsqueeze(-1), -torch.inf).flatten(-2), margin


@pytest.mark.parametrize("row", MOE_ROWS)
def test_no_router_is_undecided_and_no_expert_idle(row):
    """Else rounding picks an expert, or an expert's weights do not matter; then change `_inputs_seed`.

    The margin between the last chosen expert and the next is in router logits, whose own noise is about 1e-6, or in
    scores where there is a bias. A large bias leaves some experts of a layer without tokens: there an expert counts in
    all layers together. That the experts found here are those that the model takes is compared as well.
    """
    model = toy_models.build(row)
    margins, uses = [], []

    def record(router, args, output):
        scores, margin = choice_of(router, args[0])
        values, experts = scores.sort(-1, descending=True)
        last, following = values[:, router.top_k - 1], values[:, router.top_k]
        margins.append(min(margin, (last - following).min().item()))
        taken = experts[:, : router.top_k]
        assert torch.equal(taken.sort(-1).values, output[2].flatten(0, -2).sort(-1).values)
        uses.append(torch.bincount(taken.flatten(), minlength=scores.shape[-1]))

    routers = [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]
    biased = any("e_score_correction_bias" in name for name in model.state_dict())
    for router in routers:
        router.register_forward_hook(record)
    logits(model, row)
    blocks = [layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe for layer in model.model.layers]
    with_experts = [block for block in blocks if hasattr(block, "experts")]
    assert len(margins) == len(with_experts) >= 4
    assert min(margins) > (1e-4 if biased else 3e-4)
    assert (sum(uses) if biased else torch.stack(uses)).min() >= 3


# The generator


@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        ("matrix", [0xBE1C5E6E, 0xBFB7A471, 0x3F9859B5]),
        ("embedding", [0xBE348F28, 0xBFD40D4A, 0x3FAFEB4B]),
        ("norm", [0x3F782E7A, 0x3F368B06, 0x3F9E7858]),
        ("bias", [0xBD7A30B1, 0xBF12E9F4, 0x3EF3C2BC]),
    ],
)
def test_random_tensor_is_pinned_bit_for_bit(kind, bits):
    """Goldens made on one machine hold on every other, with any numpy; a change here makes all stale."""
    values = toy_models.random_tensor("model.layers.0.mlp.up_proj.weight", (2, 3), kind=kind)
    assert values.dtype == np.float32
    assert values.flatten()[:3].view("<u4").tolist() == bits


def test_random_tensor_depends_on_name_and_seed_and_not_on_what_came_before():
    def make(name="a", seed=0):
        return toy_models.random_tensor(name, (5, 7), seed=seed, kind="matrix")

    first = make()
    torch.manual_seed(1)
    np.random.seed(1)
    assert (make() == first).all()
    assert (make(seed=1) != first).all()
    assert (make(name="b") != first).all()
    assert (make(name="1:a", seed=0) != make(name="a", seed=1)).all()


@pytest.mark.parametrize("count", [1, 2**18 - 1, 2**18, 2**18 + 1, 2**19 + 3])
def test_blocks_do_not_show_in_the_values(count):
    """A tensor longer than a block goes on where the block ended, and has no extra or repeated values."""
    whole = toy_models.random_tensor("a", (2**19 + 4,), kind="bias")
    blocks = np.concatenate(list(random_blocks("a", (count,), kind="bias")))
    assert (blocks == whole[:count]).all()
    assert len(np.unique(whole)) > 0.95 * len(whole)


@pytest.mark.parametrize(
    ("kind", "mean", "std"),
    [
        ("matrix", 0, 1.5 / 16),
        ("embedding", 0, 1),
        ("norm", 1, 0.3 / 3**0.5),
        ("bias", 0, 0.6 / 3**0.5),
        ("decay", -1, 1 / 3**0.5),
    ],
)
def test_random_tensor_has_the_stated_moments(kind, mean, std):
    values = toy_models.random_tensor("a", (1024, 256), kind=kind).astype(np.float64)
    assert values.mean() == pytest.approx(mean, abs=std / 100)
    assert values.std() == pytest.approx(std, rel=1e-2)
    assert abs(values - mean).max() <= std * 3**0.5 * (1 + 1e-6)
    assert abs(values - mean).min() > 0


def test_random_tensor_refuses_an_unknown_kind():
    with pytest.raises(ValueError, match="kind 'conv' is none of matrix, embedding, norm, bias"):
        toy_models.random_tensor("a", (2,), kind="conv")


# Randomising a model


@pytest.mark.parametrize("row", ["qwen2_moe-square", "qwen3", "llama3.2_tied", "phi3"])
def test_no_two_tensors_share_values_and_none_is_constant(row):
    """Also not between experts, or rows of one matrix: any two mixed up change something."""
    seen: dict[bytes, str] = {}
    for name, tensor in named_tensors(toy_models.build(row)).items():
        assert tensor.unique().numel() > 0.9 * tensor.numel(), name
        for part in tensor.flatten(0, -2) if tensor.ndim > 1 else [tensor]:
            start = part.detach()[:4].numpy().tobytes()
            assert start not in seen, f"{name} and {seen[start]} share values"
            seen[start] = name


def test_weights_do_not_depend_on_torch_s_generator_and_are_whole_float32():
    torch.manual_seed(0)
    first = toy_models.weights_hash(toy_models.build("mistral"))
    torch.manual_seed(1)
    assert toy_models.weights_hash(toy_models.build("mistral")) == first
    weight = toy_models.build("mistral").model.norm.weight
    assert not torch.equal(weight.bfloat16().float(), weight), "bfloat16 would lose nothing"


def test_rotary_frequencies_stay_as_the_config_makes_them():
    model = AutoModelForCausalLM.from_config(toy_models.hf_config("llama3.1_ropescale"))
    before = model.model.rotary_emb.inv_freq.clone()
    toy_models.randomise(model)
    assert torch.equal(model.model.rotary_emb.inv_freq, before)


def test_persistent_buffers_are_randomised_and_others_are_not():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("bias", torch.zeros(4))
            self.register_buffer("scratch", torch.zeros(4), persistent=False)

    model = nn.Sequential(Block())
    toy_models.randomise(model)
    assert (model[0].bias != 0).all()
    assert (model[0].scratch == 0).all()


def test_a_tied_tensor_is_made_once_under_its_first_name():
    model = toy_models.build("llama3.2_tied")
    assert "lm_head.weight" not in named_tensors(model)
    name = "model.embed_tokens.weight"
    expected = torch.from_numpy(toy_models.random_tensor(name, (131, 64), kind="embedding"))
    assert torch.equal(model.lm_head.weight, expected)


@pytest.mark.parametrize("name", ["D", "weight", "conv1d"])
def test_a_tensor_of_unknown_role_is_refused_before_anything_is_written(name):
    model = nn.ModuleDict({"norm": nn.RMSNorm(4), "mixer": nn.Module()})
    model["mixer"].register_parameter(name, nn.Parameter(torch.zeros(4)))
    with pytest.raises(ValueError, match=rf"mixer.{name} \[4\]: no rule .* toy_models/randomise.py"):
        toy_models.randomise(model)
    assert (model["norm"].weight == 1).all()


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("model.layers.0.self_attn.q_norm.weight", (16,), "norm"),
        ("model.layers.0.mlp.gate.weight", (8, 64), "matrix"),
        ("model.layers.0.mlp.shared_expert_gate.weight", (1, 64), "matrix"),
        ("model.layers.0.mlp.experts.gate_up_proj", (8, 80, 64), "matrix"),
        ("model.layers.0.self_attn.k_proj.bias", (32,), "bias"),
        ("model.layers.0.linear_attn.A_log", (8,), "decay"),
        ("model.layers.0.linear_attn.dt_bias", (8,), "bias"),
        ("model.layers.0.linear_attn.conv1d.weight", (64, 1, 4), "matrix"),
        ("model.layers.0.linear_attn.in_proj_ba.weight", (16, 64), "matrix"),
    ],
)
def test_roles_by_name(name, shape, kind):
    assert kind_of(name, shape) == kind


def test_a_role_needs_the_right_number_of_dimensions():
    """Mamba's gated norm [groups, size], say, is not silently taken for a plain one."""
    with pytest.raises(ValueError, match=re.escape("model.norm.weight [4, 4]: no rule")):
        kind_of("model.norm.weight", (4, 4))


def test_weights_hash_sees_every_bit_name_dtype_and_shape():
    tensors = {"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(3)}
    reference = toy_models.weights_hash(tensors)
    assert toy_models.weights_hash(dict(reversed(tensors.items()))) == reference
    flipped = tensors["a"].clone()
    flipped.view(torch.uint8)[7] ^= 1
    for changed in (
        tensors | {"a": flipped},
        tensors | {"a": tensors["a"].view(2, 3)},
        tensors | {"b": tensors["b"].view(torch.float16)},
        tensors | {"a": -tensors["a"].flip(0)},
        {"d" if name == "c" else name: tensor for name, tensor in tensors.items()},
    ):
        assert toy_models.weights_hash(changed) != reference


@pytest.mark.parametrize("row", ["seed_oss", "qwen3_moe_raw"])
def test_every_tensor_matters_to_the_logits(row):
    """One part in a hundred of any tensor, or of one expert's, moves the logits by more than the gate."""
    model = toy_models.build(row)
    reference = logits(model, row)
    with torch.no_grad():
        for name, tensor in named_tensors(model).items():
            for part in tensor if tensor.ndim == 3 else [tensor]:
                before = part.clone()
                signs = torch.from_numpy(toy_models.random_tensor(name, part.shape, seed=1, kind="bias")).sign()
                part *= 1 + 0.01 * signs
                assert relative_rms(logits(model, row), reference) > GATE, name
                part.copy_(before)


# Checkpoints


@pytest.mark.parametrize("row", ROWS)
def test_transformers_loads_what_is_written(row, tmp_path):
    """No key missing or left over, three shards, a true index, and the same logits to the last bit."""
    folder = toy_models.write(row, tmp_path / "model")
    assert json.loads((folder / "config.json").read_text()) == toy_models.config_dict(row)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    assert len(files) == 3
    assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
    assert ("lm_head.weight" in index["weight_map"]) != toy_models.config_dict(row)["tie_word_embeddings"]

    model, info = toy_models.load(row, folder, experts_implementation="eager")
    # transformers reads the heads of multi-token prediction with a model of their own: tests/test_mtp.py
    assert not {key for key in info["unexpected_keys"] if not re.match(r"model\.(layers\.8|mtp_layers)\.", key)}
    assert not any(value for kind, value in info.items() if kind != "unexpected_keys"), info
    assert model.dtype == torch.float32
    assert torch.equal(logits(model, row), logits(toy_models.build(row), row))


LAYER = "model.layers.1."
ATTENTION = {f"self_attn.{name}_proj.weight" for name in "qkvo"}
NORMS = {"input_layernorm.weight", "post_attention_layernorm.weight"}
PUBLISHED = {
    "mixtral": ATTENTION
    | {"block_sparse_moe.gate.weight"}
    | {f"block_sparse_moe.experts.{e}.w{i}.weight" for e in range(8) for i in (1, 2, 3)},
    "qwen3_moe": ATTENTION
    | {"self_attn.q_norm.weight", "self_attn.k_norm.weight", "mlp.gate.weight"}
    | {f"mlp.experts.{e}.{name}_proj.weight" for e in range(8) for name in ("gate", "up", "down")},
    "phi3": {
        "self_attn.qkv_proj.weight",
        "self_attn.o_proj.weight",
        "mlp.gate_up_proj.weight",
        "mlp.down_proj.weight",
    },
    "bailing_moe_v2": {f"attention.{name}.weight" for name in ("query_key_value", "dense")}
    | {"attention.query_layernorm.weight", "attention.key_layernorm.weight", "attention.query_key_value.bias"}
    | {"mlp.gate.weight", "mlp.gate.expert_bias"}
    | {f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")}
    | {f"mlp.experts.{e}.{name}_proj.weight" for e in range(16) for name in ("gate", "up", "down")},
}


@pytest.mark.parametrize("row", PUBLISHED)
def test_names_on_disk_are_the_published_ones(row, tmp_path):
    """Those of the Mixtral, Qwen3-MoE, Phi-3 and Ling-2.0 repositories; in memory transformers fuses the experts."""
    tensors = read_folder(toy_models.write(row, tmp_path))
    layer = {name.removeprefix(LAYER) for name in tensors if name.startswith(LAYER)}
    assert layer == PUBLISHED[row] | NORMS
    assert {name for name in tensors if ".layers." not in name} == {
        "model.word_embeddings.weight" if row == "bailing_moe_v2" else "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }


RENAMED = {"tensors": [["self_attn.q", "attention.qkv"], ["self_attn.v", "attention.qkv"], ["emb", "word"]]}


def test_native_tensors_of_one_published_name_lie_in_it_one_after_the_other():
    """In the order of the table, whatever the order of the tensors; `restore` is the inverse."""
    native = {
        "self_attn.v": torch.arange(2.0),
        "self_attn.q": torch.arange(3.0) + 5,
        "emb": torch.ones(1),
        "x": torch.ones(2),
    }
    published = publish(RENAMED, native)
    assert {name: t.tolist() for name, t in published.items()} == {
        "attention.qkv": [5, 6, 7, 0, 1],
        "word": [1],
        "x": [1, 1],
    }
    back = restore(RENAMED, published, {name: t.shape for name, t in native.items()})
    assert toy_models.weights_hash(back) == toy_models.weights_hash(native)
    assert publish(None, native) == native


@pytest.mark.parametrize(
    ("name", "shape", "missing", "unexpected"),
    [
        ("word", None, {"emb"}, set()),
        ("extra", 2, set(), {"extra"}),
        ("attention.qkv", 6, {"self_attn.q", "self_attn.v"}, {"attention.qkv"}),
        ("attention.qkv", None, {"self_attn.q", "self_attn.v"}, set()),
    ],
)
def test_a_published_tensor_that_is_missing_left_over_or_of_another_size_shows_in_the_keys(
    name, shape, missing, unexpected
):
    shapes = {"self_attn.q": (3,), "self_attn.v": (2,), "emb": (1,)}
    published = {"attention.qkv": torch.zeros(5), "word": torch.zeros(1)}
    if shape is None:
        del published[name]
    else:
        published[name] = torch.zeros(shape)
    keys = restore(RENAMED, published, shapes).keys()
    assert (shapes.keys() - keys, keys - shapes.keys()) == (missing, unexpected)


def test_fields_of_a_published_config_are_renamed_dropped_and_added():
    reference = {"model_type": "b", "fields": {"num_experts": "n_routed_experts", "use_bias": None}, "config": {"x": 1}}
    config = {"model_type": "a", "num_experts": 4, "use_bias": False, "auto_map": {}, "hidden_size": 8}
    assert native_config(reference, config) == {"model_type": "b", "n_routed_experts": 4, "hidden_size": 8, "x": 1}
    assert native_config(None, config) == config


def test_experts_on_disk_are_slices_of_the_fused_tensors(tmp_path):
    """Mixtral's w1 is the gate, w3 the up and w2 the down projection."""
    tensors = read_folder(toy_models.write("mixtral", tmp_path))
    experts = toy_models.build("mixtral").model.layers[2].mlp.experts
    for e in (0, 7):
        w1, w2, w3 = (tensors[f"model.layers.2.block_sparse_moe.experts.{e}.w{i}.weight"] for i in (1, 2, 3))
        assert torch.equal(torch.cat([w1, w3]), experts.gate_up_proj[e])
        assert torch.equal(w2, experts.down_proj[e])


def test_write_in_another_dtype_and_into_one_file(tmp_path):
    folder = toy_models.write("qwen2", tmp_path, dtype=torch.bfloat16, shards=1)
    assert [file.name for file in folder.glob("*.safetensors*")] == ["model.safetensors"]
    assert {tensor.dtype for tensor in read_folder(folder).values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_write_refuses_no_shards(tmp_path):
    with pytest.raises(ValueError, match="at least one file"):
        toy_models.write("llama2", tmp_path, shards=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_streamed_checkpoint_equals_the_one_from_a_model(dtype, tmp_path):
    """The same tensors as `write` gives, though no model was ever in memory, and transformers loads them."""
    config = toy_models.config_dict("qwen2.5_tied")
    folder = toy_models.write_config_checkpoint(config, tmp_path / "a", dtype=dtype, max_shard_bytes=200_000)
    streamed = read_folder(folder)
    written = read_folder(toy_models.write("qwen2.5_tied", tmp_path / "b", dtype=dtype))
    assert toy_models.weights_hash(streamed) == toy_models.weights_hash(written)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == streamed.keys()
    assert set(index["weight_map"].values()) == {file.name for file in folder.glob("*.safetensors")}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in streamed.values())
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info


def test_shards_are_filled_in_order_and_a_larger_tensor_stands_alone():
    sizes = {"a": 4, "b": 4, "c": 11, "d": 2, "e": 8, "f": 1}
    assert checkpoint._fill_shards(sizes, 10) == [["a", "b"], ["c"], ["d", "e"], ["f"]]


def test_a_streamed_checkpoint_refuses_renamed_models_and_odd_dtypes(tmp_path):
    with pytest.raises(ValueError, match=r"mixtral: .* not the published ones"):
        toy_models.write_config_checkpoint(
            toy_models.config_dict("mixtral"), tmp_path, dtype=torch.bfloat16, max_shard_bytes=1
        )
    with pytest.raises(ValueError, match=r"torch.int8: .* torch.bfloat16"):
        toy_models.write_config_checkpoint(
            toy_models.config_dict("llama2"), tmp_path, dtype=torch.int8, max_shard_bytes=1
        )
    assert not list(tmp_path.iterdir())


def test_a_row_that_bases_itself_on_an_unknown_row_says_so(tmp_path, monkeypatch):
    (tmp_path / "twin.json").write_text('{"_base": "lama"}')
    monkeypatch.setattr(catalogue, "ROWS", tmp_path)
    with pytest.raises(ValueError, match="no toy row 'lama'; nearest: twin"):
        toy_models.config_dict("twin")
