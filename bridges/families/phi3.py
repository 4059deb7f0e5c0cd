"""Phi-3 and Phi-4: q, k, v and gate, up are fused on disk."""

from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import Phi3ForCausalLM

from bridges.config_rules import Rule
from bridges.conversion.mapping import MegatronMappingRegistry
from bridges.mechanisms.blocks import attention, embeddings, gated_mlp
from bridges.mechanisms.decoder import DecoderProvider
from bridges.model_bridge import MegatronModelBridge

_ORIGINAL = "original_max_position_embeddings"
ORIGINAL = Rule(  # where longrope changes from its short factors to its long ones; stands beside rope_scaling here
    (_ORIGINAL,),
    lambda c: {},
    lambda p: {_ORIGINAL: p.rope_scaling[_ORIGINAL]} if p.rope_scaling else {},
)


@MegatronModelBridge.register_bridge(
    source=Phi3ForCausalLM, target=GPTModel, provider=DecoderProvider, model_type="phi3"
)
class Phi3Bridge(MegatronModelBridge):
    CONFIG_MAPPING = [*MegatronModelBridge.CONFIG_MAPPING, ("resid_pdrop", "hidden_dropout")]
    CONFIG_RULES = (ORIGINAL,)
    HF_FIXED = {"embd_pdrop": 0.0, "attention_bias": False}

    def mapping_registry(self) -> MegatronMappingRegistry:
        return MegatronMappingRegistry(*embeddings(), *attention(qkv="qkv_proj"), *gated_mlp(gate_up="gate_up_proj"))
