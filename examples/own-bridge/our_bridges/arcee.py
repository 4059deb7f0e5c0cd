"""Arcee (AFM): Llama with a feed-forward block of two matrices and squared ReLU between them."""

from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import ArceeForCausalLM

from bridges import MegatronMappingRegistry, MegatronModelBridge
from bridges.mechanisms.blocks import attention, embeddings, plain_mlp


@MegatronModelBridge.register_bridge(source=ArceeForCausalLM, target=GPTModel, model_type="arcee")
class ArceeBridge(MegatronModelBridge):
    HF_FIXED = {"attention_bias": False, "mlp_bias": False}
    MEGATRON_DEFAULTS = {"gated_linear_unit": False}

    def mapping_registry(self) -> MegatronMappingRegistry:
        return MegatronMappingRegistry(*embeddings(), *attention(), *plain_mlp())
