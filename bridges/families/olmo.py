"""OLMo 2 and 3 (norms behind the blocks and none before, one norm over all heads of q and of k; OLMo 3 has windows) and OLMoE."""

from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import Olmo2ForCausalLM, Olmo3ForCausalLM, OlmoeForCausalLM

from bridges.config_rules import NORM_TOPK
from bridges.conversion.mapping import MegatronMappingRegistry
from bridges.mechanisms.blocks import attention, embeddings, gated_mlp, moe
from bridges.mechanisms.branches import post_norms
from bridges.mechanisms.decoder import DecoderProvider
from bridges.model_bridge import MegatronModelBridge

WHOLE = {"qk_layernorm": True, "whole_qk_norm": True}


@MegatronModelBridge.register_bridge(
    source=Olmo2ForCausalLM, target=GPTModel, provider=DecoderProvider, model_type="olmo2"
)
class Olmo2Bridge(MegatronModelBridge):
    HF_FIXED = {"attention_bias": False}
    MEGATRON_DEFAULTS = {**WHOLE, "pre_norm": False, "post_norm": True}

    def mapping_registry(self) -> MegatronMappingRegistry:
        return MegatronMappingRegistry(*embeddings(), *attention(), *gated_mlp(), *post_norms())


@MegatronModelBridge.register_bridge(
    source=Olmo3ForCausalLM, target=GPTModel, provider=DecoderProvider, model_type="olmo3"
)
class Olmo3Bridge(Olmo2Bridge):
    pass


@MegatronModelBridge.register_bridge(
    source=OlmoeForCausalLM, target=GPTModel, provider=DecoderProvider, model_type="olmoe"
)
class OlmoeBridge(MegatronModelBridge):
    CONFIG_MAPPING = [*MegatronModelBridge.CONFIG_MAPPING, ("intermediate_size", "moe_ffn_hidden_size")]
    CONFIG_RULES = (NORM_TOPK,)
    HF_FIXED = {"attention_bias": False, "clip_qkv": None}
    MEGATRON_DEFAULTS = WHOLE

    def mapping_registry(self) -> MegatronMappingRegistry:
        return MegatronMappingRegistry(*embeddings(), *attention(), *moe())
