"""What Hugging Face reads decides: reads are recorded, and confirmed by changing values on real models."""

from __future__ import annotations

import copy
import json
import resource
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import toy_models
from bridges import AutoBridge
from bridges.config_fields import MACHINERY, another
from bridges.config_reads import model_class, reads
from bridges.config_rules import Rule
from bridges.families.llama import LlamaBridge
from bridges.hf_pretrained import CheckpointError, ConfigError, PreTrainedCausalLM, load_config
from bridges.model_bridge import MegatronModelBridge
from bridges.source_checks import check_mtp
from harness.flops import command
from harness.reference.compare import relative_rms
from toy_models.catalogue import guests

ROWS = [row for row in toy_models.rows() if not row.endswith("-square")]
NATIVE = [row for row in ROWS if toy_models.reference_of(row) is None]

# Fields that people's files have and that change nothing (faults D1).
HARMLESS = {
    "use_mrope": False,
    "output_gate_type": "swish",
    "unsloth_fixed": True,
    "unsloth_version": "2025.1",
    "is_llama_config": True,
    "rope_interleaved": False,
    "transformers.js_config": {"dtype": "q4"},
    "max_sequence_length": 4096,
    "attn_implementation": None,
    "_attn_implementation": "eager",
    "_name_or_path": "somewhere",
    "_model_name_or_path": "somewhere",
    "name_or_path": "somewhere",
    "torchscript": False,
    "use_bfloat16": False,
    "tokenizer_class": "LlamaTokenizer",
    "unk_token_id": 0,
    "internal_version": 3,
    "full_attn_mod": 1,
    "diversity_penalty": 0.0,
    "num_beams": 1,
    "temperature": 1.0,
    "quantization_config": {"quant_method": "fp8"},
}


def bridge_of(raw: dict) -> AutoBridge:
    return AutoBridge(PreTrainedCausalLM(load_config(raw, Path("model"), trusted=False), raw))


def provider_of(raw: dict):
    return bridge_of(raw).to_megatron_provider(load_weights=False)


def native(row: str, **fields):
    """The row's config with other fields, as transformers' own class reads it."""
    config = toy_models.hf_config(row, {**toy_models.config_dict(row), **fields})
    assert model_class(config) is not None
    return config


def logits(row: str, config) -> torch.Tensor:
    """Of the row's weights under a config, as far as they fit."""
    config = copy.deepcopy(config)
    model = model_class(config)._from_config(config, attn_implementation="eager", experts_implementation="eager")
    toy_models.randomise(model)
    with torch.no_grad():
        return model.eval()(toy_models.inputs(row), use_cache=False, return_dict=True).logits


@pytest.mark.parametrize("row", NATIVE)
def test_a_field_that_nobody_reads_changes_nothing(row):
    """Every unread field of the config and every field of the machinery is changed, all at once: the same logits, bit for
    bit."""
    config = native(row)
    seen = reads(config)
    changed = copy.deepcopy(config)
    own = {
        "model_type",
        "architectures",
        "transformers_version",
        "id2label",
        "label2id",
        "dtype",
        "_name_or_path",
        "return_dict",
    }
    if row == "phi3_longrope":  # a method of the config writes it into rope_parameters, which are read
        own.add("original_max_position_embeddings")
    fields = {name for name in config.to_dict() if (name not in seen or name in MACHINERY) and name not in own}
    for name in fields:
        setattr(changed, name, another(getattr(config, name)))
    assert len(fields) >= 5
    assert torch.equal(logits(row, changed), logits(row, config)), sorted(fields)


@pytest.mark.parametrize(
    ("row", "field", "value"),
    [
        ("llama3", "rms_norm_eps", 0.5),
        ("mistral", "sliding_window", 3),
        ("glm4_moe", "partial_rotary_factor", 0.25),
        ("qwen3_moe", "norm_topk_prob", None),
        ("deepseek_v3", "routed_scaling_factor", 7.0),
        ("smollm3", "no_rope_layers", [1, 0] * 4),
        ("qwen2.5_yarn", "rope_scaling", {"rope_type": "yarn", "factor": 9.0, "original_max_position_embeddings": 8}),
    ],
)
def test_a_field_that_is_read_changes_something(row, field, value):
    """The other half: these are read, and the logits depend on them."""
    config = native(row)
    value = not getattr(config, field) if value is None else value
    assert ("rope_parameters" if "ro" in field[:2] or "rotary" in field else field) in reads(config)
    assert relative_rms(logits(row, native(row, **{field: value})), logits(row, config)) > 1e-3


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ("llama3", {"sliding_window": 8}),
        ("llama3", {"layer_types": ["sliding_attention", "full_attention"] * 4, "sliding_window": 8}),
        ("mistral", {"layer_types": ["sliding_attention", "full_attention"] * 4}),
        ("glm4_moe", {"sliding_window": 8}),
        ("llama3", {"partial_rotary_factor": 0.5}),
        ("qwen3", {"partial_rotary_factor": 0.5}),
        ("qwen3", {"num_experts": 8, "num_experts_per_tok": 2}),
        ("deepseek_v2_topk4", {"norm_topk_prob": True}),
        ("dots1", {"scoring_func": "sigmoid"}),
    ],
)
def test_fault_C4_a_rule_applies_only_where_its_field_is_read(row, fields):
    """transformers ignores the field: the provider is the same without it, and so are the logits."""
    raw = toy_models.config_dict(row)
    assert vars(provider_of({**raw, **fields})) == vars(provider_of(raw))
    assert torch.equal(logits(row, native(row, **fields)), logits(row, native(row)))


@pytest.mark.parametrize("row", ["deepseek_v3", "deepseek_v2_lite", "moonlight", "glm4_moe", "dots1"])
def test_rules_about_experts_rest_where_every_layer_is_dense(row):
    """transformers reads no field of theirs then: the model has none, and its config says so again."""
    raw = toy_models.config_dict(row)
    bridge = bridge_of({**raw, "first_k_dense_replace": raw["num_hidden_layers"]})
    provider = bridge.to_megatron_provider(load_weights=False)
    assert (provider.num_moe_experts, provider.moe_shared_expert_intermediate_size) == (None, None)
    assert provider.moe_router_num_groups is None
    config = bridge._model_bridge.megatron_to_hf_config(provider)
    assert config["first_k_dense_replace"] == raw["num_hidden_layers"]
    assert provider_of({**raw, **config}).num_moe_experts is None


def test_a_rule_of_which_transformers_reads_a_part_is_refused_for_the_rest():
    """Half of what it is about is there: nothing is guessed."""

    class Half(LlamaBridge):
        CONFIG_RULES = (
            *LlamaBridge.CONFIG_RULES,
            Rule(("hidden_size", "num_experts"), lambda c: {"num_moe_experts": c.num_experts}, lambda p: {}),
        )

    raw = {**toy_models.config_dict("llama3"), "num_experts": 8}
    with pytest.raises(ConfigError, match="hidden_size, num_experts: LlamaForCausalLM does not read num_experts"):
        Half.hf_config_to_provider_kwargs(load_config(raw, Path("model"), trusted=False))


@pytest.mark.parametrize("row", ["llama3", "qwen2", "mixtral", "deepseek_v3", "qwen3_next", "bailing_moe_v2"])
def test_fault_D1_harmless_fields_are_accepted(row):
    raw = toy_models.config_dict(row)
    fields = HARMLESS if row != "bailing_moe_v2" else {k: v for k, v in HARMLESS.items() if k in STRICT}
    assert vars(provider_of({**raw, **fields})) == vars(provider_of(raw))


# Where transformers has no class only fields of every config are let through.
STRICT = {*HARMLESS} - {"use_mrope", "output_gate_type", "rope_interleaved", "internal_version", "full_attn_mod"}


def test_fault_D1_what_is_not_read_is_reported(caplog):
    raw = {**toy_models.config_dict("qwen2"), "use_mrope": False, "full_attn_mod": 1, "num_nextn_predict_layers": 0}
    with caplog.at_level("INFO", "goldengate"):
        bridge_of(raw)
    # The window is switched off in this row.
    line = "not read by Qwen2ForCausalLM: full_attn_mod, num_nextn_predict_layers, sliding_window, use_mrope"
    assert [r.getMessage() for r in caplog.records if "not read" in r.getMessage()] == [line]


def test_a_field_that_becomes_one_that_is_read_counts():
    """max_window_layers becomes layer_types; a null says nothing."""
    raw = {**toy_models.config_dict("qwen2"), "use_sliding_window": True, "max_window_layers": 3, "mrope_section": None}
    bridge = bridge_of(raw)
    assert bridge._model_bridge.unread_fields(bridge.hf_pretrained.config, raw)[1] == []
    assert bridge.to_megatron_provider().window_attn_skip_freq == [0, 0, 0, 1, 1, 1, 1, 1]


def test_fault_D1_all_unknown_fields_are_named_at_once():
    """What is read and unknown; where transformers has no class, whatever is unknown."""
    raw = toy_models.config_dict("qwen3")
    with pytest.raises(ConfigError, match=r"attention_bias = True.*; .* is_causal = False, which Qwen3"):
        bridge_of({**raw, "attention_bias": True, "is_causal": False})
    raw = toy_models.config_dict("bailing_moe_v2")
    with pytest.raises(
        ConfigError, match=r"n_group, topk_group are missing.*; .*norm_head = True.*; .*use_a = 1, use_b = 2 "
    ):
        bridge_of({**raw, "use_a": 1, "use_b": 2, "norm_head": True, "n_group": None, "topk_group": None})


def test_nested_keys_count_only_where_they_are_used():
    """yarn's truncate is used by transformers and not by Megatron's latent attention; "type" is nobody's."""
    raw = toy_models.config_dict("deepseek_v3")
    scaling = {**raw["rope_scaling"], "type": "yarn", "whatever": 3}
    assert vars(provider_of({**raw, "rope_scaling": scaling})) == vars(provider_of(raw))
    with pytest.raises(ConfigError, match="rope_scaling with attention_factor, truncate is not built"):
        provider_of({**raw, "rope_scaling": {**scaling, "truncate": False, "attention_factor": 1.5}})


def test_fault_D2_the_model_type_decides_without_architectures():
    raw = {k: v for k, v in toy_models.config_dict("llama3").items() if k != "architectures"}
    assert isinstance(bridge_of(raw)._model_bridge, MegatronModelBridge.find({"model_type": "llama"}).bridge)
    assert AutoBridge.from_hf_config(transformers.LlamaConfig()).to_megatron_provider().num_layers == 32
    with pytest.raises(ConfigError, match="names no architecture, and model type t5 has no bridge"):
        MegatronModelBridge.find({"model_type": "t5"})


def test_fault_D7_quantised_sources_have_a_provider(tmp_path):
    """Provider, FLOPs and plan need no weights; importing says what is missing, in one line."""
    folder = toy_models.write("llama3", tmp_path / "model", shards=1)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    bridge = AutoBridge.from_hf_pretrained(folder)
    assert bridge.to_megatron_provider(load_weights=False).num_layers == 8
    with pytest.raises(CheckpointError, match=r"its weights are quantised \(fp8\)"):
        _ = bridge.hf_pretrained.checkpoint


def test_fault_D8_the_text_model_of_a_vision_language_model_is_named():
    """And its text config alone works, also under the model type of the whole."""
    text = toy_models.config_dict("qwen3_5_text")
    whole = {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "text_config": text}
    with pytest.raises(ConfigError, match="no bridge; its text_config alone has one, as Qwen3_5ForCausalLM"):
        bridge_of(whole)
    same = provider_of({**text, "model_type": "qwen3_5", "image_token_id": 100, "vision_end_token_id": 101})
    assert vars(same) == vars(provider_of(text))


def test_fault_D9_permission_is_not_asked_for_what_has_no_bridge(tmp_path):
    raw = {"architectures": ["XverseForCausalLM"], "model_type": "xverse", "auto_map": {"AutoConfig": "c.XverseConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    for source in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(ConfigError, match="architecture XverseForCausalLM has no bridge"):
            command.load_provider(str(source))
    with pytest.raises(CheckpointError, match="nobody/nothing is neither a folder nor a model that the hub"):
        command.load_provider("nobody/nothing")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("LlamaForCausalM", "LlamaForCausalLM"),
        ("Qwen3MoEForCausalLM", "Qwen3MoeForCausalLM"),
        ("XLNetLMHeadModel", None),
        ("GptOssForCausalLM", None),
        ("DeepseekV32ForCausalLM", None),
        ("Gwen2ForCausalLM", "Qwen2ForCausalLM"),
        ("Qwen9ForCausalLM", None),
    ],
)
def test_fault_F_only_near_misses_are_suggested(name, near):
    with pytest.raises(ConfigError) as caught:
        MegatronModelBridge.find({"architectures": [name]})
    assert ("did you mean" in str(caught.value)) == (near is not None)
    assert near is None or f"did you mean {near}?" in str(caught.value)


@pytest.mark.parametrize(
    "row", ["qwen3", "seed_oss", "qwen3_next", "qwen3_5_text", "bailing_moe_v2", "llama3", "qwen2"]
)
def test_fault_C5_head_dim_is_stated_where_absence_means_another(row):
    """A head dim of hidden / heads comes back as that number, whatever the class default is."""
    raw = toy_models.config_dict(row)
    raw["head_dim"] = raw["hidden_size"] // raw["num_attention_heads"]
    bridge = bridge_of(raw)
    provider = bridge.to_megatron_provider()
    assert provider.kv_channels == raw["head_dim"]
    written = bridge._model_bridge.megatron_to_hf_config(provider)
    assert provider_of(written).kv_channels == raw["head_dim"]


def test_fault_D6_yarn_multiplies_cos_and_sin_on_grouped_query_attention():
    """The row's golden holds the logits; here, that the factor is not 1 and arrives."""
    provider = provider_of(toy_models.config_dict("qwen2.5_yarn")).finalize()
    assert provider._rope()[1] == pytest.approx(1.1386, abs=1e-4)


# The fields of DeepSeek-V3's config.json.
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "topk_group": 4,
    "vocab_size": 129280,
    "torch_dtype": "bfloat16",
}


def test_a_published_size_takes_no_memory_and_little_time():
    """671 G parameters: read in about 0.4 s of an idle core, once per config. The bound is on processor time."""
    config = load_config(DEEPSEEK_V3, Path("model"), trusted=False)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    seen = reads(config)
    assert time.process_time() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KiB
    assert {"kv_lora_rank", "n_routed_experts", "rope_parameters.rope_theta"} <= seen.names
    assert reads(copy.deepcopy(config)) is seen


@pytest.mark.parametrize("row", NATIVE)
def test_every_row_is_read(row):
    """No class falls back to the strict rule, and recording leaves the process as it was."""
    config = native(row)
    module = sys.modules[model_class(config).__module__]
    before, state, text = dict(vars(module)), torch.get_rng_state(), config.to_json_string()
    config.num_labels = 3 + len(row)  # not in the cache
    assert reads(config) is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert {k: v for k, v in vars(module).items() if before.get(k) is not v} == {}
    assert json.loads(text)["hidden_size"] == config.hidden_size
    assert torch.get_default_dtype() == torch.float32


def test_a_folder_of_configs_is_surveyed(tmp_path):
    """`goldengate flops FOLDER`: a line a config, with its FLOPs or why there are none."""
    for row in ("llama3", "qwen3_moe"):
        (tmp_path / f"{row}.json").write_text(json.dumps({**toy_models.config_dict(row), "unsloth": 1}))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "t5.json").write_text(json.dumps({"architectures": ["T5Model"], "model_type": "t5"}))
    found = {one.file: one for one in command.survey(str(tmp_path), seq=16)}
    assert command.is_collection(str(tmp_path))
    assert found["llama3.json"].flops > 0
    assert found["llama3.json"].unread == ["unsloth"]
    assert found["qwen3_moe.json"].refusal == ""
    assert "not JSON" in found["broken.json"].refusal
    assert "T5Model has no bridge" in found["t5.json"].refusal


def test_fault_D13_a_rows_dtype_under_either_name(tmp_path):
    """`dtype` is `torch_dtype`; what is not float32 is refused with the reason."""
    raw = toy_models.config_dict("llama3")
    del raw["torch_dtype"]
    rows = {"new_name": {**raw, "dtype": "float32"}, "narrow": {**raw, "dtype": "bfloat16"}}
    with guests(rows):
        folder = toy_models.write("new_name", tmp_path / "new", shards=1)
        written = json.loads((folder / "config.json").read_text())
        assert written["dtype"] == "float32"
        assert "torch_dtype" not in written
        with pytest.raises(ValueError, match="row narrow says dtype = 'bfloat16': a row is float32"):
            toy_models.write("narrow", tmp_path / "narrow")


@pytest.mark.parametrize("row", ["deepseek_v3", "glm4_moe", "qwen3_5_text"])
def test_fault_D3_dropped_mtp_tensors_are_named_with_the_way_out(row, tmp_path):
    """A checkpoint that transformers saved: the layers' tensors are gone, their number is still there."""
    folder = toy_models.write(row, tmp_path / "model", shards=1)
    config = json.loads((folder / "config.json").read_text())
    layer = f"model.layers.{config['num_hidden_layers']}."
    tensors = load_file(folder / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if not name.startswith((layer, "mtp."))}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    bridge = AutoBridge.from_hf_pretrained(folder)
    provider, source = bridge.to_megatron_provider(load_weights=False), bridge.hf_pretrained.checkpoint
    with pytest.raises(CheckpointError, match=r"1 layers of multi-token prediction.* provider.mtp_num_layers = None"):
        check_mtp(source, provider, bridge.mapping_registry(source))
    provider.mtp_num_layers = None
    check_mtp(source, provider, bridge.mapping_registry(source))
