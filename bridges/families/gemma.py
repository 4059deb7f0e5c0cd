"""Gemma (1), Gemma 2 (norms on both sides of each block, softcaps, a window on every other layer) and Gemma 3's text model
(q and k norms, a rope of its own for windowed layers)."""

from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import Gemma2ForCausalLM, Gemma3ForCausalLM, GemmaForCausalLM

from bridges.conversion.mapping import MegatronMappingRegistry
from bridges.mechanisms.blocks import attention, embeddings, gated_mlp
from bridges.mechanisms.branches import post_norms
from bridges.mechanisms.decoder import DecoderProvider
from bridges.mechanisms.scales import GEMMA_EMBEDDING, QUERY_PRE_ATTN_SCALAR, SOFTCAPS
from bridges.model_bridge import MegatronModelBridge


@MegatronModelBridge.register_bridge(
    source=GemmaForCausalLM, target=GPTModel, provider=DecoderProvider, model_type="gemma"
)
class GemmaBridge(MegatronModelBridge):
    CONFIG_RULES = (GEMMA_EMBEDDING,)
    HF_FIXED = {"attention_bias": False, "use_bidirectional_attention": None}
    MEGATRON_DEFAULTS = {"layernorm_zero_centered_gamma": True}

    def mapping_registry(self) -> MegatronMappingRegistry:
        return MegatronMappingRegistry(*embeddings(), *attention(), *gated_mlp())


@MegatronModelBridge.register_bridge(
    source=Gemma2ForCausalLM, target=GPTModel, provider=DecoderProvider, model_type="gemma2"
)
class Gemma2Bridge(GemmaBridge):
    CONFIG_MAPPING = [*MegatronModelBridge.CONFIG_MAPPING, *SOFTCAPS]
    CONFIG_RULES = (GEMMA_EMBEDDING, QUERY_PRE_ATTN_SCALAR)
    MEGATRON_DEFAULTS = {**GemmaBridge.MEGATRON_DEFAULTS, "post_norm": True}

    def mapping_registry(self) -> MegatronMappingRegistry:
        return MegatronMappingRegistry(
            *embeddings(), *attention(), *gated_mlp(norm="pre_feedforward_layernorm"), *post_norms()
        )


@MegatronModelBridge.register_bridge(
    source=Gemma3ForCausalLM, target=GPTModel, provider=DecoderProvider, model_type="gemma3_text"
)
class Gemma3Bridge(Gemma2Bridge):
    HF_FIXED = {"attention_bias": False, "use_bidirectional_attention": False}
    MEGATRON_DEFAULTS = {**Gemma2Bridge.MEGATRON_DEFAULTS, "qk_layernorm": True}
