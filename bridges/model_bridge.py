"""MegatronModelBridge: what a family writes, and the registry that finds it.

A family is a table: which config fields mean what (CONFIG_MAPPING, CONFIG_RULES, *_DEFAULTS) and which tensors a
Megatron parameter is made of (mapping_registry). Nothing is guessed: a config field that no table knows is an error.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from megatron.core.activations import fast_gelu, quick_gelu, squared_relu
from transformers import CONFIG_MAPPING as HF_CONFIG_CLASSES
from transformers import PreTrainedConfig

from bridges.config_rules import DTYPE, HEAD_DIM, ROPE, WINDOW, Rule, dtype_from_hf
from bridges.conversion.mapping import MegatronMappingRegistry
from bridges.errors import GoldengateError
from bridges.providers.provider import GPTModelProvider

logger = logging.getLogger("goldengate")


class ConfigError(GoldengateError, ValueError):
    """A config.json that the bridge cannot account for: the message names the field."""


@dataclass(frozen=True)
class Registration:
    bridge: type[MegatronModelBridge]
    architecture: str
    target: type | None
    provider: type[GPTModelProvider]
    model_type: str | None
    aliases: tuple[str, ...] = ()  # further model types that config.json may carry for the same model


_REGISTERED: dict[str, Registration] = {}


class MegatronModelBridge:
    """Base of all bridges. Subclasses are stateless; the model at hand comes in as an argument."""

    # Field for field, Hugging Face -> provider.
    CONFIG_MAPPING: ClassVar[list[tuple[str, str]]] = [
        ("num_hidden_layers", "num_layers"),
        ("hidden_size", "hidden_size"),
        ("intermediate_size", "ffn_hidden_size"),
        ("num_attention_heads", "num_attention_heads"),
        ("num_key_value_heads", "num_query_groups"),
        ("vocab_size", "vocab_size"),
        ("max_position_embeddings", "max_position_embeddings"),
        ("rms_norm_eps", "layernorm_epsilon"),
        ("initializer_range", "init_method_std"),
        ("tie_word_embeddings", "share_embeddings_and_output_weights"),
        ("attention_dropout", "attention_dropout"),
        ("num_experts", "num_moe_experts"),
        ("num_local_experts", "num_moe_experts"),
        ("n_routed_experts", "num_moe_experts"),
        ("routed_scaling_factor", "moe_router_topk_scaling_factor"),
        ("num_experts_per_tok", "moe_router_topk"),
        ("moe_intermediate_size", "moe_ffn_hidden_size"),
        ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
    ]
    ACTIVATION_MAPPING: ClassVar[dict[str, Callable]] = {
        "silu": F.silu,
        "swish": F.silu,
        "gelu": F.gelu,
        "gelu_pytorch_tanh": fast_gelu,
        "quick_gelu": quick_gelu,
        "relu": F.relu,
        "relu2": squared_relu,
        "tanh": torch.tanh,
    }
    CONFIG_RULES: ClassVar[tuple[Rule, ...]] = ()
    MEGATRON_DEFAULTS: ClassVar[dict[str, Any]] = {}
    HF_DEFAULTS: ClassVar[dict[str, Any]] = {}
    # Fields that change the computation and of which only this value is built.
    HF_FIXED: ClassVar[dict[str, Any]] = {}
    # For a model type that transformers does not have: the fields that config.json must state, and those that we write.
    HF_FIELDS: ClassVar[frozenset[str]] = frozenset()
    # Fields that do not change what the forward computes.
    HF_INERT: ClassVar[frozenset[str]] = frozenset(
        {
            "architectures",
            "model_type",
            "transformers_version",
            "auto_map",
            "_name_or_path",
            "use_cache",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
            "sep_token_id",
            "decoder_start_token_id",
            "output_router_logits",
            "router_aux_loss_coef",
            "router_jitter_noise",
            "output_attentions",
            "output_hidden_states",
            "return_dict",
            "chunk_size_feed_forward",
            "is_encoder_decoder",
            "id2label",
            "label2id",
            "problem_type",
            "pretraining_tp",
            "default_theta",
            "_attn_implementation_autoset",
            "is_decoder",
            "add_cross_attention",
            "num_labels",
            "max_window_layers",  # transformers turns it into layer_types, which counts
        }
    )

    _BASE_RULES: ClassVar[tuple[Rule, ...]] = (ROPE, DTYPE, HEAD_DIM, WINDOW)
    registration: ClassVar[Registration | None] = None
    # The config of the model at hand, set by AutoBridge; some names on disk count from the number of layers.
    hf_config: PreTrainedConfig | None = None

    # -- registration ------------------------------------------------------------------------------------------------

    @classmethod
    def register_bridge(
        cls,
        *,
        source: type | str,
        target: type | None = None,
        provider: type[GPTModelProvider] | None = None,
        model_type: str | None = None,
        aliases: tuple[str, ...] = (),
    ):
        """Class decorator. `source` is a transformers class or the name that config.json gives in `architectures`.

        A config.json whose model type transformers does not have is read without the code that it ships when the model
        type is `model_type` or one of `aliases`: as `model_type`'s config class, or as it stands where there is none.
        """
        architecture = source if isinstance(source, str) else source.__name__

        def register(bridge: type[MegatronModelBridge]) -> type[MegatronModelBridge]:
            if architecture in _REGISTERED and _REGISTERED[architecture].bridge.__qualname__ != bridge.__qualname__:
                logger.warning(
                    "%s replaces %s as the bridge of %s",
                    bridge.__name__,
                    _REGISTERED[architecture].bridge.__name__,
                    architecture,
                )
            registration = Registration(bridge, architecture, target, provider or GPTModelProvider, model_type, aliases)
            bridge.registration = _REGISTERED[architecture] = registration
            return bridge

        return register

    @staticmethod
    def supported() -> list[str]:
        return sorted(_REGISTERED)

    @staticmethod
    def registered(architectures: list[str] | None) -> Registration | None:
        """The registration for a config's `architectures`, if there is one."""
        return next((_REGISTERED[a] for a in architectures or () if a in _REGISTERED), None)

    @staticmethod
    def find(architectures: list[str] | None) -> Registration:
        """The registration for a config's `architectures`. ConfigError names the architecture and the nearest known."""
        if registration := MegatronModelBridge.registered(architectures):
            return registration
        name = (architectures or ["(none given)"])[0]
        near = difflib.get_close_matches(name, _REGISTERED, n=1)
        raise ConfigError(
            f"architecture {name} has no bridge"
            + (f"; did you mean {near[0]}?" if near else "")
            + " (goldengate families lists them)"
        )

    # -- configuration -----------------------------------------------------------------------------------------------

    @classmethod
    def _rules(cls) -> tuple[Rule, ...]:
        return (*cls._BASE_RULES, *cls.CONFIG_RULES)

    @classmethod
    def check_config(cls, config: PreTrainedConfig, raw: dict | None = None) -> None:
        """Raise ConfigError for the first field of `config` (and of the file's own `raw`) that no table accounts for."""
        known = {hf for hf, _ in cls.CONFIG_MAPPING} | {f for rule in cls._rules() for f in rule.hf}
        known |= {"hidden_act", "hidden_activation"} | cls.HF_INERT
        values = {**config.to_dict(), **(raw or {})}
        if missing := [name for name in sorted(cls.HF_FIELDS) if values.get(name) is None]:
            raise ConfigError(f"config field {missing[0]} is missing: only the model's own code knows its default")
        for name, value in sorted(values.items()):
            if name in cls.HF_FIXED:
                if value not in (cls.HF_FIXED[name], None):
                    raise ConfigError(
                        f"config field {name} = {value!r}: {cls.__name__} computes only {name} = {cls.HF_FIXED[name]!r}"
                    )
            elif name.endswith("bias") and value is False:
                continue  # no such tensor; one that is there all the same has no mapping and is refused on import
            elif name not in known and value is not None:
                raise ConfigError(
                    f"config field {name} = {value!r} is not known to {cls.__name__}: map it in CONFIG_MAPPING "
                    "or a rule, or list it in HF_INERT when it does not change the computation"
                )

    @classmethod
    def hf_config_to_provider_kwargs(cls, config: PreTrainedConfig) -> dict[str, Any]:
        """Provider fields from a config: CONFIG_MAPPING, the activation, then the rules."""
        kwargs = {}
        for hf, megatron in cls.CONFIG_MAPPING:
            if (value := getattr(config, hf, None)) is not None:
                kwargs[megatron] = value
        if (
            activation := getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
        ) is not None:
            kwargs["activation_func"] = cls.hf_to_megatron_activation(activation)
        for rule in cls._rules():
            kwargs.update(rule.to_megatron(config))
        return kwargs

    def provider_bridge(self, hf_pretrained) -> GPTModelProvider:
        """The provider of a model; `hf_pretrained.config` is its config. Families rarely need to override this."""
        provider = self.registration.provider if self.registration else GPTModelProvider
        kwargs = {**self.MEGATRON_DEFAULTS, **self.hf_config_to_provider_kwargs(hf_pretrained.config)}
        return provider(**kwargs)

    @classmethod
    def megatron_to_hf_config(cls, provider: GPTModelProvider) -> dict[str, Any]:
        """The config.json of a provider, hub style: the exact inverse of hf_config_to_provider_kwargs.

        Raises ConfigError for an activation function that has no Hugging Face name.
        """
        registration = cls.registration
        config: dict[str, Any] = {**cls.HF_FIXED, **cls.HF_DEFAULTS}
        if registration:
            config["architectures"] = [registration.architecture]
            if registration.model_type:
                config["model_type"] = registration.model_type
        config["hidden_act"] = cls.megatron_to_hf_activation(provider.activation_func)
        for hf, megatron in cls.CONFIG_MAPPING:
            if megatron.startswith("moe_") and not provider.num_moe_experts:
                continue  # Megatron has defaults for experts that are not there
            if (value := getattr(provider, megatron, None)) is not None:
                config[hf] = value
        for rule in cls._rules():
            config.update(rule.to_hf(provider))
        fields = cls._declared_fields(config.get("model_type"))
        if fields:  # only what this model type's config class has; these it reads without declaring them
            fields |= {
                "architectures",
                "model_type",
                "torch_dtype",
                "rope_theta",
                "rope_scaling",
                "partial_rotary_factor",
                "head_dim",
            }
            if provider.mtp_num_layers:
                fields |= {"num_nextn_predict_layers", "mtp_num_hidden_layers"}
            config = {k: v for k, v in config.items() if k in fields}
        return config

    @classmethod
    def _declared_fields(cls, model_type: str | None) -> set[str]:
        if cls.HF_FIELDS or not model_type or model_type not in HF_CONFIG_CLASSES:
            ruled = {name for rule in cls.CONFIG_RULES for name in rule.hf}
            return {*cls.HF_FIELDS, *cls.HF_FIXED, *ruled} if cls.HF_FIELDS else set()
        blank = HF_CONFIG_CLASSES[model_type]()
        return set(blank.to_dict()) | set(blank.attribute_map)

    @classmethod
    def hf_to_megatron_activation(cls, name: str) -> Callable:
        """ConfigError for a name that ACTIVATION_MAPPING does not have."""
        if name not in cls.ACTIVATION_MAPPING:
            raise ConfigError(
                f"activation {name!r} is not known; ACTIVATION_MAPPING has {', '.join(cls.ACTIVATION_MAPPING)}"
            )
        return cls.ACTIVATION_MAPPING[name]

    @classmethod
    def megatron_to_hf_activation(cls, function: Callable) -> str:
        """ConfigError for a function that ACTIVATION_MAPPING does not have."""
        for name, known in cls.ACTIVATION_MAPPING.items():
            if function is known:
                return name
        raise ConfigError(
            f"activation function {getattr(function, '__name__', function)!r} has no Hugging Face name in "
            "ACTIVATION_MAPPING"
        )

    @staticmethod
    def dtype_from_hf(config: PreTrainedConfig, default: torch.dtype = torch.float32) -> torch.dtype:
        return dtype_from_hf(config, default)

    # -- tensors -----------------------------------------------------------------------------------------------------

    def mapping_registry(self) -> MegatronMappingRegistry:
        raise NotImplementedError(f"{type(self).__name__} does not say which tensors its parameters are made of")

    # Hugging Face tensors (patterns with *) that repeat another one: compared on import, written again on export.
    REPEATED_TENSORS: ClassVar[dict[str, str]] = {}
    # Hugging Face tensors (patterns with *) that no Megatron parameter needs, each with the reason: an export copies them.
    IGNORED_TENSORS: ClassVar[dict[str, str]] = {}
