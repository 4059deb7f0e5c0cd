"""Llama 2, 3, 3.1 and 3.2."""

from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import LlamaForCausalLM

from bridges.conversion.mapping import MegatronMappingRegistry
from bridges.mechanisms.blocks import attention, embeddings, gated_mlp
from bridges.mechanisms.branches import ATTENTION_BIAS
from bridges.mechanisms.decoder import DecoderProvider
from bridges.model_bridge import MegatronModelBridge


@MegatronModelBridge.register_bridge(
    source=LlamaForCausalLM, target=GPTModel, provider=DecoderProvider, model_type="llama"
)
class LlamaBridge(MegatronModelBridge):
    CONFIG_MAPPING = [*MegatronModelBridge.CONFIG_MAPPING, ("mlp_bias", "mlp_bias")]
    CONFIG_RULES = (ATTENTION_BIAS,)

    def mapping_registry(self) -> MegatronMappingRegistry:
        return MegatronMappingRegistry(*embeddings(), *attention(), *gated_mlp())
