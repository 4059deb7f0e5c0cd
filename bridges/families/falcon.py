"""Falcon: attention and feed-forward side by side, each behind a LayerNorm of its own or both behind one; queries, keys and
values of a group follow each other on disk as they do in Megatron. Falcon-RW (ALiBi) is not built."""

from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import FalconForCausalLM

from bridges.config_rules import HF, Fields, Rule
from bridges.conversion.mapping import MegatronMappingRegistry
from bridges.mechanisms.blocks import MEGATRON_LAYER, attention, embeddings, linear, plain_mlp
from bridges.mechanisms.decoder import DecoderProvider
from bridges.model_bridge import MegatronModelBridge


def _to_megatron(config: HF) -> Fields:
    """Old models share one norm, and have one group (multi-query) or as many as heads."""
    own = config.num_ln_in_parallel_attn != 1 and config.new_decoder_architecture
    groups = config.num_attention_heads if not config.multi_query else 1
    return {
        "shared_norm": not own,
        "num_query_groups": config.num_kv_heads if config.new_decoder_architecture else groups,
    }


def _to_hf(provider) -> Fields:
    """As published: new models say multi_query too, which counts in old ones, and one norm only where it is one."""
    old = provider.shared_norm and provider.num_query_groups in (1, provider.num_attention_heads)
    return {
        "new_decoder_architecture": not old,
        "multi_query": not old or provider.num_query_groups == 1,
        "num_kv_heads": None if old else provider.num_query_groups,
        "num_ln_in_parallel_attn": 1 if provider.shared_norm and not old else None,
    }


ARCHITECTURE = Rule(
    ("new_decoder_architecture", "multi_query", "num_kv_heads", "num_ln_in_parallel_attn"), _to_megatron, _to_hf
)
ACTIVATION = Rule(
    ("activation",),
    lambda c: {"activation_func": MegatronModelBridge.hf_to_megatron_activation(c.activation)},
    lambda p: {"activation": MegatronModelBridge.megatron_to_hf_activation(p.activation_func)},
)


@MegatronModelBridge.register_bridge(
    source=FalconForCausalLM, target=GPTModel, provider=DecoderProvider, model_type="falcon"
)
class FalconBridge(MegatronModelBridge):
    CONFIG_MAPPING = [
        *(pair for pair in MegatronModelBridge.CONFIG_MAPPING if pair[0] != "num_key_value_heads"),
        ("layer_norm_epsilon", "layernorm_epsilon"),
        ("ffn_hidden_size", "ffn_hidden_size"),
        ("hidden_dropout", "hidden_dropout"),
        ("bias", "add_bias_linear"),
    ]
    CONFIG_RULES = (ARCHITECTURE, ACTIVATION)
    HF_FIXED = {"alibi": False, "parallel_attn": True}
    MEGATRON_DEFAULTS = {"normalization": "LayerNorm", "parallel_blocks": True, "gated_linear_unit": False}

    def mapping_registry(self) -> MegatronMappingRegistry:
        layer, names = "transformer.h.*", ("dense_h_to_4h", "dense_4h_to_h")
        norms = ("ln_attn", "ln_mlp") if not self.shared_norm() else ("input_layernorm", "input_layernorm")
        return MegatronMappingRegistry(
            *embeddings(embed="transformer.word_embeddings", norm="transformer.ln_f"),
            *linear(f"{MEGATRON_LAYER}.self_attention.linear_qkv", f"{layer}.self_attention.query_key_value"),
            *attention(layer=layer, norm=norms[0], block="self_attention", output="dense"),
            *plain_mlp(layer=layer, norm=norms[1], names=names),
        )

    def shared_norm(self) -> bool:
        return self.hf_config is not None and _to_megatron(self.hf_config)["shared_norm"]
