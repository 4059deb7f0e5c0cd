"""Seed-OSS: biases on q, k and v but not on the output projection."""

from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import SeedOssForCausalLM

from bridges.conversion.mapping import MegatronMappingRegistry
from bridges.mechanisms.blocks import attention, embeddings, gated_mlp
from bridges.model_bridge import MegatronModelBridge


@MegatronModelBridge.register_bridge(source=SeedOssForCausalLM, target=GPTModel, model_type="seed_oss")
class SeedOssBridge(MegatronModelBridge):
    CONFIG_MAPPING = [
        *MegatronModelBridge.CONFIG_MAPPING,
        ("attention_bias", "add_qkv_bias"),
        ("residual_dropout", "hidden_dropout"),
    ]
    HF_FIXED = {"attention_out_bias": False, "mlp_bias": False}

    def mapping_registry(self) -> MegatronMappingRegistry:
        return MegatronMappingRegistry(*embeddings(), *attention(), *gated_mlp())
