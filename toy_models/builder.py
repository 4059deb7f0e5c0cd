"""From a row's JSON file to a Hugging Face model and its inputs."""

import copy
import inspect
import sys

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import MtpModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from toy_models import mtp
from toy_models.catalogue import config_dict, row_file
from toy_models.randomise import generator, randomise
from toy_models.reference import native_config

BATCH, SEQUENCE = 4, 24


def reference_of(row: str) -> dict | None:
    """How transformers computes a model that it has no class for, see toy_models.reference; None where it has one."""
    return copy.deepcopy(row_file(row).get("_reference"))


def golden_key(row: str) -> dict:
    """What a golden depends on beside weights and inputs."""
    return config_dict(row) | {key: value for key, value in row_file(row).items() if key in ("_mtp", "_reference")}


def hf_config(row: str, config: dict | None = None) -> PretrainedConfig:
    """The row (or another config.json of its family) as a transformers config, read the way a hub config.json is
    (rope_theta, rope_scaling, ...)."""
    native = native_config(reference_of(row), config_dict(row) if config is None else copy.deepcopy(config))
    return CONFIG_MAPPING[native["model_type"]].from_dict(native)


def reference_class(row: str) -> str:
    """The name of the transformers class that is the row's truth."""
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[hf_config(row).model_type]


def build(row: str, *, dtype: torch.dtype = torch.float32, attn_implementation: str = "eager") -> PreTrainedModel:
    """The row's HF model in eval mode, every parameter and persistent buffer random.

    The random values are float32, rounded to `dtype` if that is narrower. A mixture of experts runs HF's
    plain loop over experts and not a grouped kernel. The heads of a row with multi-token prediction are its
    attribute `mtp`, which is None for other rows; they are no part of its state dict.
    """
    model = AutoModelForCausalLM.from_config(
        hf_config(row), dtype=dtype, attn_implementation=attn_implementation, experts_implementation="eager"
    )
    plain_torch(model)
    randomise(model)
    spec = mtp_spec(row)
    attach_mtp(model, mtp.make(spec, model) if spec else None)
    return model.eval()


def plain_torch(model: PreTrainedModel) -> None:
    """transformers' own PyTorch functions for a model, where it would take those of another package (fla's GPU kernels for
    gated delta nets, say) once that is installed: the reference runs on a CPU and is the same everywhere."""
    module = sys.modules[type(model).__module__]
    for name, function in list(vars(module).items()):
        if hasattr(function, "__wrapped__") and name.startswith(("torch_", "causal_conv1d_")):
            setattr(module, name, inspect.unwrap(function))


def published_as_in_memory(row: str) -> bool:
    """Are the row's tensors published under transformers' own names (`_as_in_memory`), though its conversion on saving
    would give others (experts one by one)?"""
    return row_file(row).get("_as_in_memory", False)


def mtp_spec(row: str) -> dict | None:
    """What the row's file says of its multi-token prediction heads, see toy_models.mtp."""
    return copy.deepcopy(row_file(row).get("_mtp"))


def attach_mtp(model: PreTrainedModel, heads: MtpModel | None) -> None:
    """Beside the main model and not below it, where transformers would save them under wrong names."""
    object.__setattr__(model, "mtp", heads)


def inputs(row: str) -> torch.Tensor:
    """Token ids, int64 [4, 24], the same in every run and different for every row.

    24 tokens are more than any row's sliding window. The padding id is left out: HF gives its embedding row
    no gradient, Megatron does. Where a token's last chosen expert and the next nearly tie, rounding decides
    and comparing logits means nothing; such a row's file names another `_inputs_seed`.
    """
    config = row_file(row)
    allowed = [i for i in range(config["vocab_size"]) if i != config.get("pad_token_id")]
    raw = generator(f"inputs of {row}", config.get("_inputs_seed", 0)).random_raw(BATCH * SEQUENCE)
    return torch.tensor([allowed[int(bits) % len(allowed)] for bits in raw]).view(BATCH, SEQUENCE)
