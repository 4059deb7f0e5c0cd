"""The code examples of the seeds run as they stand, with only their imports replaced by ours.

The guide to extending a bridge (a string-registered bridge, remote code, debugging), the refactored Llama and Qwen2
bridges, the plugin that adds aliases to a registry, and the smoke test for a new model.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from megatron.core.activations import fast_gelu
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import AutoConfig, LlamaForCausalLM, Qwen2ForCausalLM, dynamic_module_utils

import toy_models
from bridges import (
    SAFE_REPOS,
    AutoBridge,
    AutoMapping,
    ConfigError,
    GatedMLPMapping,
    GPTModelProvider,
    MappingError,
    MegatronMappingRegistry,
    MegatronModelBridge,
    MLAModelProvider,
    PreTrainedCausalLM,
    QKVMapping,
    hf_pretrained,
    is_safe_repo,
    model_bridge,
)
from bridges.checkpoints.comparison import same_bytes
from bridges.checkpoints.reader import Checkpoint
from harness.ranks import jobs
from harness.reference.compare import relative_rms
from tests.bounds import assert_same, of_row


@contextmanager
def restored_registry() -> Iterator[None]:
    """Bridges registered inside are forgotten afterwards, those replaced are back, and SAFE_REPOS is as it was."""
    before, safe = dict(model_bridge._REGISTERED), list(SAFE_REPOS)
    try:
        yield
    finally:
        model_bridge._REGISTERED.clear()
        model_bridge._REGISTERED.update(before)
        SAFE_REPOS[:] = safe


@pytest.fixture(autouse=True)
def registry():
    """Every test here leaves the registry as it found it."""
    with restored_registry():
        yield


def edit_config(folder: Path, **fields) -> Path:
    """Set fields of config.json; None removes one."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Rows as checkpoint folders, written once."""
    made: dict[str, Path] = {}

    def make(row: str) -> Path:
        if row not in made:
            made[row] = toy_models.write(row, tmp_path_factory.mktemp("checkpoint") / row)
        return made[row]

    return make


# -- the guide: a bridge registered by string ----------------------------------------------------------------------------


class YourModelProvider(GPTModelProvider):
    """Step 2 of the guide."""

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        num_attention_heads: int,
        ffn_hidden_size: int,
        num_query_groups: int = None,  # noqa: RUF013 - as the guide has it
        max_position_embeddings: int = 2048,
        rotary_base: float = 10000.0,
        rotary_percent: float = 1.0,
        # Add custom parameters as needed
        **kwargs,
    ):
        super().__init__(
            num_layers=num_layers,
            hidden_size=hidden_size,
            num_attention_heads=num_attention_heads,
            ffn_hidden_size=ffn_hidden_size,
            num_query_groups=num_query_groups,
            max_position_embeddings=max_position_embeddings,
            rotary_base=rotary_base,
            rotary_percent=rotary_percent,
            **kwargs,
        )


def register_your_model(architecture: str = "YourModelForCausalLM") -> type[MegatronModelBridge]:
    """Step 3 of the guide."""

    @MegatronModelBridge.register_bridge(
        source=architecture,  # ← String! No import of HF class needed
        target=GPTModel,
    )
    class YourModelBridge(MegatronModelBridge):
        def provider_bridge(self, hf_pretrained: PreTrainedCausalLM) -> YourModelProvider:
            """Map HuggingFace config to Megatron provider."""
            cfg = hf_pretrained.config

            return YourModelProvider(
                num_layers=cfg.num_hidden_layers,
                hidden_size=cfg.hidden_size,
                num_attention_heads=cfg.num_attention_heads,
                num_query_groups=getattr(cfg, "num_key_value_heads", cfg.num_attention_heads),
                ffn_hidden_size=getattr(cfg, "intermediate_size", 4 * cfg.hidden_size),
                max_position_embeddings=getattr(cfg, "max_position_embeddings", 2048),
                rotary_base=getattr(cfg, "rope_theta", 10000.0),
                # Map dtype
                fp16=self.dtype_from_hf(cfg) == torch.float16,
                bf16=self.dtype_from_hf(cfg) == torch.bfloat16,
                params_dtype=self.dtype_from_hf(cfg),
                # Add custom config mappings
            )

        def mapping_registry(self) -> MegatronMappingRegistry:
            """Define parameter name mappings between HF and Megatron."""
            return MegatronMappingRegistry(
                # Embeddings
                AutoMapping(
                    megatron_param="embedding.word_embeddings.weight",
                    hf_param="model.embed_tokens.weight",
                ),
                # Output layer
                AutoMapping(
                    megatron_param="output_layer.weight",
                    hf_param="lm_head.weight",
                ),
                # Final norm
                AutoMapping(
                    megatron_param="decoder.final_layernorm.weight",
                    hf_param="model.norm.weight",
                ),
                # Attention QKV (fused in Megatron, separate in HF)
                QKVMapping(
                    megatron_param="decoder.layers.*.self_attention.linear_qkv.weight",
                    q="model.layers.*.self_attn.q_proj.weight",
                    k="model.layers.*.self_attn.k_proj.weight",
                    v="model.layers.*.self_attn.v_proj.weight",
                ),
                # Attention output projection
                AutoMapping(
                    megatron_param="decoder.layers.*.self_attention.linear_proj.weight",
                    hf_param="model.layers.*.self_attn.o_proj.weight",
                ),
                # MLP gated (gate + up fused in Megatron)
                GatedMLPMapping(
                    megatron_param="decoder.layers.*.mlp.linear_fc1.weight",
                    gate="model.layers.*.mlp.gate_proj.weight",
                    up="model.layers.*.mlp.up_proj.weight",
                ),
                # MLP down projection
                AutoMapping(
                    megatron_param="decoder.layers.*.mlp.linear_fc2.weight",
                    hf_param="model.layers.*.mlp.down_proj.weight",
                ),
                # Layer norms
                AutoMapping(
                    megatron_param="decoder.layers.*.self_attention.linear_qkv.layer_norm_weight",
                    hf_param="model.layers.*.input_layernorm.weight",
                ),
                AutoMapping(
                    megatron_param="decoder.layers.*.mlp.linear_fc1.layer_norm_weight",
                    hf_param="model.layers.*.post_attention_layernorm.weight",
                ),
                # Add more mappings as needed for your architecture
            )

    return YourModelBridge


@pytest.fixture(params=["llama", "your_model"])
def your_model(request, checkpoints, tmp_path) -> Path:
    """A checkpoint of the guide's model: llama's shapes and names, its model type known to transformers or not."""
    folder = tmp_path / "your-model"
    shutil.copytree(checkpoints("llama3"), folder)
    # The guide's provider leaves the norm's epsilon at Megatron's 1e-5, which is Llama 3's published one.
    return edit_config(folder, architectures=["YourModelForCausalLM"], model_type=request.param, rms_norm_eps=1e-5)


def guide_step_5(folder: Path, out: Path, ids: np.ndarray) -> tuple[float, str, np.ndarray]:
    """On a rank: the guide's usage as it stands; (rope base, provider's class, logits of the model before export)."""
    with restored_registry(), contextlib.chdir(out):
        register_your_model()
        bridge = AutoBridge.from_hf_pretrained(folder)

        # Convert to Megatron
        provider = bridge.to_megatron_provider()
        provider.tensor_model_parallel_size = 1
        provider.pipeline_model_parallel_size = 1
        provider.finalize()
        model = provider.provide_distributed_model(wrap_with_ddp=False)

        # Export back to HF
        bridge.save_hf_pretrained(model, "./exported_model")

        jobs.set_current(jobs.Current(bridge, provider, model))
        _, (logits,) = jobs.forward(ids)
        return provider.rotary_base, type(provider).__name__, logits


def test_the_guides_bridge_computes_what_hugging_face_does_and_exports_the_same_bytes(ranks, your_model, tmp_path):
    """Steps 2, 3 and 5: logits equal Llama's with its own rope theta, and the export holds the source's bytes."""
    ids = toy_models.inputs("llama3")
    [(base, provider, logits)] = ranks.run(1, guide_step_5, your_model, tmp_path, ids.numpy())
    assert (base, provider) == (500000.0, "YourModelProvider")

    reference = LlamaForCausalLM.from_pretrained(
        edit_config(your_model, model_type="llama"), attn_implementation="eager"
    )
    with torch.no_grad():
        expected = reference(ids, use_cache=False).logits
    assert_same(torch.from_numpy(logits), expected, of_row("llama3"))
    reference.model.rotary_emb.inv_freq = 10000.0 ** (-torch.arange(0, 16, 2) / 16)  # rope theta ignored would show
    with torch.no_grad():
        assert relative_rms(reference(ids, use_cache=False).logits, expected) > 1e-2

    exported = tmp_path / "exported_model"
    with Checkpoint.open(your_model) as source, Checkpoint.open(exported) as copied:
        assert same_bytes(source, copied) == []
        assert len(source.tensors) == 8 * 9 + 3


def test_the_exported_config_is_the_sources(ranks, your_model, tmp_path):
    """config.json comes back with every field as it was, rope theta among them."""
    before = json.loads((your_model / "config.json").read_text())
    ranks.run(1, guide_step_5, your_model, tmp_path, toy_models.inputs("llama3").numpy())
    assert json.loads((tmp_path / "exported_model" / "config.json").read_text()) == before


@pytest.mark.parametrize("row", ["llama3", "llama3.1_ropescale", "phi3", "qwen3_moe"])
def test_hub_names_of_rope_are_restored(row, checkpoints):
    """transformers 5 moves rope_theta and partial_rotary_factor into rope_parameters; bridges read them by name. The raw
    config stays what the file says."""
    opened, raw = PreTrainedCausalLM.open(checkpoints(row)), toy_models.config_dict(row)
    assert opened.config.rope_theta == raw["rope_theta"] != 10000.0
    if "partial_rotary_factor" in raw:
        assert opened.config.partial_rotary_factor == raw["partial_rotary_factor"] != 1.0
    assert opened.raw == json.loads((checkpoints(row) / "config.json").read_text())


def inspect_parameter_mappings(folder: Path) -> list[str]:
    """On a rank: the guide's debugging tip, line by line as it prints."""
    lines: list[str] = []
    with restored_registry():
        register_your_model()
        bridge = AutoBridge.from_hf_pretrained(folder)
        provider = bridge.to_megatron_provider()
        provider.finalize()
        model = provider.provide_distributed_model(wrap_with_ddp=False)

        # Get all conversion tasks
        tasks = bridge.get_conversion_tasks(model)

        # Print mappings
        for task in tasks[:10]:  # First 10 tasks
            lines.append(f"Megatron: {task.param_name}")
            lines.append(f"Mapping: {task.mapping.__class__.__name__}")
            lines.append("---")
    return lines


def test_conversion_tasks_name_parameter_and_mapping(ranks, your_model):
    """The guide's debugging tip prints global names and the classes that the bridge was written with."""
    [lines] = ranks.run(1, inspect_parameter_mappings, your_model)
    found = dict(zip(lines[0::3], lines[1::3], strict=True))
    assert len(found) == 10
    assert found["Megatron: decoder.layers.0.self_attention.linear_qkv.weight"] == "Mapping: QKVMapping"
    assert found["Megatron: decoder.layers.0.mlp.linear_fc1.weight"] == "Mapping: GatedMLPMapping"
    assert found["Megatron: embedding.word_embeddings.weight"] == "Mapping: AutoMapping"


def test_check_bridge_registration(your_model):
    """list_supported_models and can_handle, before and after the bridge is registered."""
    assert "YourModelForCausalLM" not in AutoBridge.list_supported_models()
    assert not AutoBridge.can_handle(your_model)
    register_your_model()
    assert "YourModelForCausalLM" in AutoBridge.list_supported_models()
    assert "LlamaForCausalLM" in AutoBridge.list_supported_models()
    assert AutoBridge.can_handle(your_model)
    assert not AutoBridge.can_handle(your_model / "nowhere")


def test_a_typo_in_the_architecture_is_told_the_near_match(your_model):
    """The guide's "Casual" for "Causal": the error names the config's architecture and the registered one."""
    register_your_model("YourModelForCasualLM")
    with pytest.raises(ConfigError, match=r"YourModelForCausalLM has no bridge; did you mean YourModelForCasualLM\?"):
        AutoBridge.from_hf_pretrained(your_model)
    assert not AutoBridge.can_handle(your_model)


def test_wildcard_count_mismatch_is_refused_at_construction():
    """The guide's parameter mapping mismatch, and its correction."""
    with pytest.raises(MappingError, match=r"has 1 wildcards, model\.layers\.\*\.\*\.self_attn\.q_proj\.weight has 2"):
        QKVMapping(
            megatron_param="decoder.layers.*.self_attention.linear_qkv.weight",  # 1 wildcard
            q="model.layers.*.*.self_attn.q_proj.weight",  # 2 wildcards - MISMATCH!
            k="model.layers.*.*.self_attn.k_proj.weight",
            v="model.layers.*.*.self_attn.v_proj.weight",
        )
    QKVMapping(
        megatron_param="decoder.layers.*.self_attention.linear_qkv.weight",  # 1 wildcard
        q="model.layers.*.self_attn.q_proj.weight",  # 1 wildcard - MATCH!
        k="model.layers.*.self_attn.k_proj.weight",
        v="model.layers.*.self_attn.v_proj.weight",
    )


def transformer_config_of(folder: Path) -> tuple[bool, int, int, int]:
    """On a rank: the guide's conversion without the full model."""
    # Load only config (no weights)
    config = AutoConfig.from_pretrained(folder)
    bridge = AutoBridge.from_hf_config(config)

    # Check TransformerConfig
    transformer_config = bridge.transformer_config
    return (
        isinstance(transformer_config, TransformerConfig),
        transformer_config.num_layers,
        transformer_config.hidden_size,
        transformer_config.num_attention_heads,
    )


def test_a_config_alone_gives_the_transformer_config(ranks, checkpoints):
    """from_hf_config needs no weights."""
    assert ranks.run(1, transformer_config_of, checkpoints("llama3")) == [(True, 8, 64, 4)]


def test_not_finalizing_is_an_error(checkpoints, ranks):
    """The guide's pitfall: building without finalize() is refused, not built with a wrong config."""
    with pytest.raises(RuntimeError, match=r"call provider\.finalize\(\) before building a model"):
        ranks.run(1, build_without_finalize, checkpoints("llama3"))


def build_without_finalize(folder: Path) -> None:
    provider = AutoBridge.from_hf_pretrained(folder).to_megatron_provider()
    provider.tensor_model_parallel_size = 1
    provider.provide_distributed_model()


# -- the guide: providers with features of their own ---------------------------------------------------------------------


@dataclass
class FusedProvider(GPTModelProvider):
    """The guide's provider with a field of its own; Megatron has no such field, the pattern is what counts."""

    fused_qkv_gemm: bool = False


class LlamaModelProvider(GPTModelProvider):
    """Part 2, scenario 1 of the guide."""

    def __init__(
        self,
        use_flash_linear_attention: bool = False,  # ← Add parameter
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.use_flash_linear_attention = use_flash_linear_attention

    def get_transformer_config(self):
        """Build TransformerConfig with new feature."""
        config = super().get_transformer_config()

        # Pass to Megatron Core
        config.use_flash_linear_attention = self.use_flash_linear_attention

        return config


@pytest.mark.parametrize("enabled", [True, False])
def test_a_providers_own_feature_reaches_the_transformer_config(enabled):
    """Step 5 of the guide's complete example: sizes alone finalize, the flag is on the config."""
    provider = FusedProvider(
        num_layers=12,
        hidden_size=768,
        num_attention_heads=12,
        fused_qkv_gemm=enabled,  # ← Enable feature
    )
    provider.finalize()

    config = provider.get_transformer_config()
    assert config.fused_qkv_gemm is enabled
    assert isinstance(config, TransformerConfig)


def test_a_provider_may_pass_its_feature_on_in_get_transformer_config():
    """Scenario 1 of the guide."""
    provider = LlamaModelProvider(
        use_flash_linear_attention=True, num_layers=12, hidden_size=768, num_attention_heads=12
    )
    provider.finalize()
    assert provider.get_transformer_config().use_flash_linear_attention is True


# -- the guide: remote code ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "trust", "safe"),
    [
        ("deepseek-ai/DeepSeek-V3", None, True),  # hub id, whitelisted
        ("Qwen/Qwen3-0.6B", None, True),
        ("deepseek-ai/DeepSeek-V3", False, False),  # an explicit answer comes first
        ("other-org/their-model", None, False),  # hub id, not whitelisted
        ("other-org/their-model", True, True),
        ("other-org/their-model", False, False),
        ("gpt2", None, False),  # a model without an organisation ships no code
        ("deepseek-ai", None, False),
        ("/data/models/DeepSeek-V3", None, False),  # absolute
        ("/data/deepseek-ai/DeepSeek-V3", None, False),
        ("/data/my-custom-model", True, True),
        ("/data/my-custom-model", False, False),
        ("/deepseek-ai/DeepSeek-V3", None, False),
        ("./my-model", None, False),  # relative
        ("./deepseek-ai/DeepSeek-V3", None, False),
        ("../deepseek-ai", None, False),
        ("deepseek-ai/DeepSeek-V3/snapshot", None, False),
        ("deepseek-ai/", None, False),
        ("./my-model", True, True),
        ("/home/user/.cache/huggingface/hub/models--deepseek-ai--DeepSeek-V3-Base/snapshots/abc123", None, False),
        ("~/.cache/huggingface/hub/models--deepseek-ai--DeepSeek-V3/snapshots/abc123", None, False),
        ("C:\\models\\custom-model", None, False),  # Windows
        ("C:\\deepseek-ai\\custom-model", None, False),
        ("C:/models/custom-model", None, False),
        ("C:\\models\\custom-model", True, True),
    ],
)
def test_is_safe_repo(path, trust, safe):
    """Every row of the guide's tables: an explicit answer, else hub ids of whitelisted organisations only."""
    assert is_safe_repo(path, trust) is safe
    if "\\" not in path and not path.endswith("/") and not path.startswith("./"):
        assert is_safe_repo(Path(path), trust) is safe


def test_a_local_folder_that_looks_like_a_hub_id_is_not_safe(tmp_path, monkeypatch):
    """deepseek-ai/model below the working directory is somebody's copy; also behind a symbolic link."""
    monkeypatch.chdir(tmp_path)
    assert is_safe_repo("deepseek-ai/model")
    (tmp_path / "deepseek-ai" / "model").mkdir(parents=True)
    os.symlink(tmp_path / "deepseek-ai" / "model", tmp_path / "deepseek-ai" / "link")
    for local in ("deepseek-ai/model", "deepseek-ai/link"):
        assert not is_safe_repo(local)
        assert is_safe_repo(local, True)


def test_an_organisation_added_to_the_whitelist_is_safe():
    """Step 1 of the guide."""
    assert not is_safe_repo("your-org/your-model")
    SAFE_REPOS.append("your-org")
    assert is_safe_repo("your-org/your-model")


@pytest.fixture
def remote_model(checkpoints, tmp_path, monkeypatch) -> Path:
    """A checkpoint with code of its own, which leaves a file `ran` when it runs."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "remote"
    shutil.copytree(checkpoints("llama3"), folder)
    (folder / "configuration_strange.py").write_text(
        f"from pathlib import Path\nfrom transformers import LlamaConfig\nPath({str(folder / 'ran')!r}).touch()\n"
        "class StrangeConfig(LlamaConfig):\n    model_type = 'strange'\n"
    )
    return edit_config(folder, model_type="strange", auto_map={"AutoConfig": "configuration_strange.StrangeConfig"})


@pytest.mark.parametrize("trust", [None, False])
def test_remote_code_of_a_local_path_needs_the_explicit_answer(remote_model, trust):
    """Scenarios 1 and 4: refused with the way out, nothing has run, and can_handle says no."""
    with pytest.raises(ConfigError, match=r"trust_remote_code=False.*pass trust_remote_code=True") as error:
        AutoBridge.from_hf_pretrained(remote_model, trust)
    assert isinstance(error.value, ValueError)  # the guide's kind of error
    assert not AutoBridge.can_handle(remote_model, trust)
    assert not (remote_model / "ran").exists()


def test_remote_code_runs_with_permission(remote_model):
    """Scenario 2."""
    assert AutoBridge.can_handle(str(remote_model), trust_remote_code=True)
    bridge = AutoBridge.from_hf_pretrained(remote_model, trust_remote_code=True)
    assert type(bridge.hf_pretrained.config).__name__ == "StrangeConfig"
    assert bridge.hf_pretrained.config.rope_theta == 500000.0
    assert (remote_model / "ran").exists()


@pytest.mark.parametrize(
    ("repo", "trust", "runs"),
    [
        ("deepseek-ai/strange", None, True),
        ("deepseek-ai/strange", False, False),
        ("other-org/strange", None, False),
        ("other-org/strange", True, True),
    ],
)
def test_remote_code_of_a_hub_id(remote_model, monkeypatch, repo, trust, runs):
    """Scenario 3: a whitelisted organisation needs no word, another does, and a no counts for both."""
    monkeypatch.setattr(hf_pretrained, "_hub_folder", lambda name, *_: remote_model)
    with contextlib.nullcontext() if runs else pytest.raises(ConfigError, match="trust_remote_code"):
        AutoBridge.from_hf_pretrained(repo, trust_remote_code=trust)
    assert (remote_model / "ran").exists() is runs


@pytest.mark.parametrize("trust", [None, False, True])
def test_code_of_a_model_that_transformers_knows_is_never_run(remote_model, trust):
    """auto_map beside a known model type: our config class, no permission needed, nothing runs."""
    edit_config(remote_model, model_type="llama")
    assert AutoBridge.can_handle(remote_model, trust)
    AutoBridge.from_hf_pretrained(remote_model, trust)
    assert not (remote_model / "ran").exists()


# -- the refactored bridges ----------------------------------------------------------------------------------------------


def test_base_class_tables():
    """CONFIG_MAPPING and ACTIVATION_MAPPING hold what the refactoring names."""
    for pair in [
        ("num_hidden_layers", "num_layers"),
        ("hidden_size", "hidden_size"),
        ("intermediate_size", "ffn_hidden_size"),
        ("num_attention_heads", "num_attention_heads"),
        ("num_key_value_heads", "num_query_groups"),
        ("num_experts", "num_moe_experts"),
        ("num_experts_per_tok", "moe_router_topk"),
        ("moe_intermediate_size", "moe_ffn_hidden_size"),
    ]:
        assert pair in MegatronModelBridge.CONFIG_MAPPING
    activations = MegatronModelBridge.ACTIVATION_MAPPING
    assert {
        "silu": F.silu,
        "gelu": F.gelu,
        "relu": F.relu,
        "tanh": torch.tanh,
        "gelu_pytorch_tanh": fast_gelu,
    }.items() <= activations.items()


def test_activations_go_both_ways_and_unknown_ones_raise():
    """The review's wish: no silent silu."""
    for name, function in MegatronModelBridge.ACTIVATION_MAPPING.items():
        assert MegatronModelBridge.hf_to_megatron_activation(name) is function
        back = MegatronModelBridge.megatron_to_hf_activation(function)
        assert MegatronModelBridge.ACTIVATION_MAPPING[back] is function
    with pytest.raises(ConfigError, match=r"'mish' is not known; ACTIVATION_MAPPING has silu"):
        MegatronModelBridge.hf_to_megatron_activation("mish")
    with pytest.raises(ConfigError, match="'mish' has no Hugging Face name"):
        MegatronModelBridge.megatron_to_hf_activation(F.mish)


def test_an_unknown_activation_raises_from_config_to_provider_and_back(checkpoints, tmp_path):
    """Through the whole conversion, in both directions."""
    folder = shutil.copytree(checkpoints("llama3"), tmp_path / "mish")
    with pytest.raises(ConfigError, match="'mish'"):
        AutoBridge.from_hf_pretrained(edit_config(folder, hidden_act="mish")).to_megatron_provider()
    bridge = AutoBridge.from_hf_pretrained(checkpoints("llama3"))
    provider = bridge.to_megatron_provider()
    provider.activation_func = F.mish
    with pytest.raises(ConfigError, match="mish"):
        bridge.megatron_to_hf_config(provider)


def test_qwen2_needs_no_provider_bridge(checkpoints):
    """Defaults alone: the base class makes the registered family's provider."""
    ours = AutoBridge.from_hf_pretrained(checkpoints("qwen2")).to_megatron_provider(load_weights=False)

    @MegatronModelBridge.register_bridge(source=Qwen2ForCausalLM, target=GPTModel)
    class Qwen2Bridge(MegatronModelBridge):
        MEGATRON_DEFAULTS = {"add_qkv_bias": True}
        HF_DEFAULTS = {"model_type": "qwen2"}
        # Base class provider_bridge() handles everything!

    assert "provider_bridge" not in vars(Qwen2Bridge)
    bridge = AutoBridge.from_hf_pretrained(checkpoints("qwen2"))
    assert isinstance(bridge._model_bridge, Qwen2Bridge)
    provider = bridge.to_megatron_provider(load_weights=False)
    assert type(provider) is GPTModelProvider
    assert provider.add_qkv_bias is True
    assert fields(provider) == fields(ours)
    assert Qwen2Bridge.megatron_to_hf_config(provider)["model_type"] == "qwen2"


def fields(provider: GPTModelProvider) -> dict:
    return {k: v for k, v in vars(provider).items() if k != "weight_loader"}


def test_llama_overrides_provider_bridge_for_rope_scaling(checkpoints):
    """super().provider_bridge() and an attribute of one's own."""

    @MegatronModelBridge.register_bridge(source=LlamaForCausalLM, target=GPTModel, model_type="llama")
    class LlamaBridge(MegatronModelBridge):
        MEGATRON_DEFAULTS = {"normalization": "RMSNorm"}
        HF_DEFAULTS = {"model_type": "llama"}
        HF_FIXED = {"attention_bias": False, "mlp_bias": False}

        def provider_bridge(self, hf_pretrained):
            provider = super().provider_bridge(hf_pretrained)
            # RoPE scaling for Llama 3.1/3.2 only
            if rope_scaling := getattr(hf_pretrained.config, "rope_scaling", None):
                provider._rope_scaling = {k: v for k, v in rope_scaling.items() if k != "rope_theta"}
            return provider

    bridge = AutoBridge.from_hf_pretrained(checkpoints("llama3.1_ropescale"))
    assert isinstance(bridge._model_bridge, LlamaBridge)
    provider = bridge.to_megatron_provider()
    assert isinstance(provider, GPTModelProvider)
    assert (
        provider._rope_scaling == toy_models.config_dict("llama3.1_ropescale")["rope_scaling"] == provider.rope_scaling
    )


@pytest.mark.parametrize("row", [row for row in toy_models.rows() if not toy_models.reference_of(row)])
def test_megatron_to_hf_config_is_the_inverse(row, checkpoints):
    """config -> provider kwargs -> provider -> config.json text -> config -> the same kwargs, for every row that
    transformers has a config class for; the check `config` sees the others through their own file."""
    bridge = AutoBridge.from_hf_pretrained(checkpoints(row))
    family, config = type(bridge._model_bridge), bridge.hf_pretrained.config
    kwargs = family.hf_config_to_provider_kwargs(config)
    provider = bridge.to_megatron_provider(load_weights=False)
    written = json.loads(json.dumps(family.megatron_to_hf_config(provider)))
    assert written["architectures"] == config.architectures
    assert written["model_type"] == config.model_type
    again = PreTrainedCausalLM(type(config).from_dict(dict(written)), written)
    assert family.hf_config_to_provider_kwargs(again.config) == kwargs
    if "mtp_num_layers" not in kwargs:  # Qwen3-Next's heads are counted on disk, where `again` has nothing
        provider.mtp_num_layers = None
    assert fields(family().provider_bridge(again)) == fields(provider)


def test_there_is_one_method_for_the_way_back():
    """The review's wish: provider_to_hf_config is combined into megatron_to_hf_config."""
    assert not hasattr(MegatronModelBridge, "provider_to_hf_config")


def test_a_changed_provider_changes_the_exported_config(checkpoints):
    """Only the field that changed; the source's other fields stay as the file has them."""
    bridge = AutoBridge.from_hf_pretrained(checkpoints("llama3.1_ropescale"))
    raw = json.loads((checkpoints("llama3.1_ropescale") / "config.json").read_text())
    provider = bridge.to_megatron_provider()
    assert bridge.megatron_to_hf_config(provider) == raw
    provider.max_position_embeddings = 77
    assert bridge.megatron_to_hf_config(provider) == {**raw, "max_position_embeddings": 77}


def test_register_bridge_takes_provider_and_model_type(checkpoints, tmp_path):
    """provider= is the class that the base provider_bridge makes, model_type= what megatron_to_hf_config writes."""

    @MegatronModelBridge.register_bridge(
        source="YourModelForCausalLM", target=GPTModel, provider=FusedProvider, model_type="llama"
    )
    class FusedBridge(MegatronModelBridge):
        MEGATRON_DEFAULTS = {"fused_qkv_gemm": True}
        HF_FIXED = {"attention_bias": False, "mlp_bias": False}

    folder = shutil.copytree(checkpoints("llama3"), tmp_path / "fused")
    bridge = AutoBridge.from_hf_pretrained(edit_config(folder, architectures=["YourModelForCausalLM"]))
    provider = bridge.to_megatron_provider(load_weights=False)
    assert type(provider) is FusedProvider
    assert provider.fused_qkv_gemm is True
    assert provider.rotary_base == 500000.0
    config = FusedBridge.megatron_to_hf_config(provider)
    assert (config["model_type"], config["architectures"]) == ("llama", ["YourModelForCausalLM"])


def test_provider_may_be_the_one_for_latent_attention():
    """register_bridge(provider=MLAModelProvider), as the DeepSeek and Kimi bridges are registered."""

    @MegatronModelBridge.register_bridge(
        source="YourLatentForCausalLM", target=GPTModel, provider=MLAModelProvider, model_type="deepseek_v3"
    )
    class LatentBridge(MegatronModelBridge):
        MEGATRON_DEFAULTS = {"q_lora_rank": 24}

    config = PreTrainedCausalLM(AutoConfig.for_model("deepseek_v3", num_hidden_layers=2))
    made = LatentBridge().provider_bridge(config)
    assert type(made) is MLAModelProvider
    assert isinstance(made, GPTModelProvider)
    assert (made.multi_latent_attention, made.num_layers) == (True, 2)


def test_replacing_a_bridge_is_said_aloud(caplog):
    """A second bridge of another name for the same architecture."""
    register_your_model()
    with caplog.at_level(logging.WARNING, logger="goldengate"):
        MegatronModelBridge.register_bridge(source="YourModelForCausalLM")(type("Other", (MegatronModelBridge,), {}))
    assert "Other replaces YourModelBridge as the bridge of YourModelForCausalLM" in caplog.text


# -- the plugin that adds aliases -----------------------------------------------------------------------------------------


def _add_legacy_mtp_aliases(registry):
    """The plugin's function as it stands."""
    if registry is None:
        return registry
    original = list(registry.mappings)
    extra = []
    for mapping in original:
        m_param = getattr(mapping, "megatron_param", None)
        if isinstance(m_param, str) and ".mtp_model_layer." in m_param:
            alias = copy.copy(mapping)
            alias.megatron_param = m_param.replace(".mtp_model_layer.", ".transformer_layer.")
            extra.append(alias)
    if not extra:
        return registry

    cls = registry.__class__
    new_registry = cls(*original, *extra)
    return new_registry


def mtp_registry() -> MegatronMappingRegistry:
    layer, hf = "mtp.layers.*.mtp_model_layer", "mtp.layers.*"
    return MegatronMappingRegistry(
        AutoMapping("embedding.word_embeddings.weight", "embed.weight"),
        QKVMapping(f"{layer}.self_attention.linear_qkv.weight", q=f"{hf}.q", k=f"{hf}.k", v=f"{hf}.v"),
        GatedMLPMapping(
            f"{layer}.mlp.experts.linear_fc1.weight*", gate=f"{hf}.experts.*.gate", up=f"{hf}.experts.*.up"
        ),
        AutoMapping(f"{layer}.mlp.linear_fc2.weight", f"{hf}.down"),
    )


def test_legacy_mtp_aliases_are_found_beside_the_names_they_stand_for():
    """Both names lead to the same tensors; doing it twice changes no answer; the first registry is untouched."""
    original = mtp_registry()
    before = [mapping.megatron_param for mapping in original.mappings]
    once = _add_legacy_mtp_aliases(original)
    twice = _add_legacy_mtp_aliases(once)
    assert type(once) is MegatronMappingRegistry
    assert len(once.mappings) == len(before) + 3
    for tail in ("self_attention.linear_qkv.weight", "mlp.experts.linear_fc1.weight5", "mlp.linear_fc2.weight"):
        expected = original.megatron_to_hf_lookup(f"mtp.layers.0.mtp_model_layer.{tail}")[1]
        for augmented in (once, twice):
            for layer in ("mtp_model_layer", "transformer_layer"):
                assert augmented.megatron_to_hf_lookup(f"mtp.layers.0.{layer}.{tail}")[1] == expected
        with pytest.raises(MappingError):
            original.megatron_to_hf_lookup(f"mtp.layers.0.transformer_layer.{tail}")
    assert [mapping.megatron_param for mapping in original.mappings] == before


def test_a_registry_without_mtp_is_given_back_as_it_is():
    """No alias, no new registry; None stays None."""
    original = AutoBridge.from_hf_config(toy_models.hf_config("llama3")).mapping_registry()
    assert _add_legacy_mtp_aliases(original) is original
    assert _add_legacy_mtp_aliases(None) is None


# -- the smoke test --------------------------------------------------------------------------------------------------------


def smoke_test(folder: str) -> list[tuple[str, tuple[int, ...], str]]:
    """On a rank: the smoke test for a new model; what it prints, and each tensor's device."""
    printed = []
    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = 1
    provider.pipeline_model_parallel_size = 1
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    bridge.load_hf_weights(model)
    for i, (name, tensor) in enumerate(bridge.export_hf_weights(model, cpu=True)):
        printed.append((name, tuple(tensor.shape), tensor.device.type))
        if i > 10:
            break
    return printed


@pytest.mark.parametrize("row", ["qwen3", "llama3.2_tied", "mixtral"])
def test_smoke_test_of_a_new_model(row, ranks, checkpoints):
    """Names and shapes as the checkpoint has them, the first twelve."""
    [printed] = ranks.run(1, smoke_test, str(checkpoints(row)))
    with Checkpoint.open(checkpoints(row)) as source:
        expected = [(name, info.shape, "cpu") for name, info in source.tensors.items()][:12]
    assert printed == expected
    assert len(printed) == 12
