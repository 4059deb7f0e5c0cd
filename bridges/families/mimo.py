"""MiMo-7B: Qwen2 with heads of multi-token prediction whose projection takes the hidden state first."""

from megatron.core.models.gpt.gpt_model import GPTModel

from bridges.conversion.mapping import MegatronMappingRegistry
from bridges.mechanisms import mtp
from bridges.mechanisms.blocks import attention, embeddings, gated_mlp
from bridges.model_bridge import MegatronModelBridge


@MegatronModelBridge.register_bridge(source="MiMoForCausalLM", target=GPTModel, model_type="mimo")
class MiMoBridge(MegatronModelBridge):
    CONFIG_RULES = (mtp.DEPTH,)
    HF_FIXED = {"attention_bias": True, "use_mrope": False}
    MEGATRON_DEFAULTS = {"add_qkv_bias": True}

    def mapping_registry(self) -> MegatronMappingRegistry:
        layer = [*attention(), *gated_mlp()]
        heads = mtp.heads(
            layer,
            self.hf_config,
            prefix="model.mtp_layers.{k}",
            enorm="token_layernorm",
            hnorm="hidden_layernorm",
            projection="input_proj",
            norm="final_layernorm",
            hidden_first=True,
        )
        return MegatronMappingRegistry(*embeddings(), *layer, *heads)
