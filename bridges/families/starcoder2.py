"""StarCoder2: LayerNorm, biases everywhere, an MLP without a gate."""

from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import Starcoder2ForCausalLM

from bridges.conversion.mapping import MegatronMappingRegistry
from bridges.mechanisms.blocks import attention, embeddings, plain_mlp
from bridges.model_bridge import MegatronModelBridge


@MegatronModelBridge.register_bridge(source=Starcoder2ForCausalLM, target=GPTModel, model_type="starcoder2")
class Starcoder2Bridge(MegatronModelBridge):
    CONFIG_MAPPING = [
        *MegatronModelBridge.CONFIG_MAPPING,
        ("norm_epsilon", "layernorm_epsilon"),
        ("residual_dropout", "hidden_dropout"),
        ("use_bias", "add_bias_linear"),
    ]
    HF_FIXED = {"embedding_dropout": 0.0}
    MEGATRON_DEFAULTS = {"normalization": "LayerNorm", "gated_linear_unit": False}

    def mapping_registry(self) -> MegatronMappingRegistry:
        return MegatronMappingRegistry(*embeddings(), *attention(), *plain_mlp(names=("c_fc", "c_proj")))
