"""MegatronModelBridge: what a family writes, and the registry that finds it.

A family is a table: which config fields mean what (CONFIG_MAPPING, CONFIG_RULES, *_DEFAULTS) and which tensors a
Megatron parameter is made of (mapping_registry). Nothing is guessed: a config field that no table knows is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from megatron.core.activations import fast_gelu, quick_gelu, squared_relu
from transformers import CONFIG_MAPPING as HF_CONFIG_CLASSES
from transformers import PreTrainedConfig

from bridges import config_fields
from bridges.config_reads import ConfigError, Seen, UnreadError, reads
from bridges.config_rules import DTYPE, HEAD_DIM, ROPE, WINDOW, Rule, dtype_from_hf
from bridges.conversion.mapping import MegatronMappingRegistry
from bridges.errors import GoldengateError, near_miss
from bridges.providers.provider import GPTModelProvider

logger = logging.getLogger("goldengate")


@dataclass(frozen=True)
class Registration:
    bridge: type[MegatronModelBridge]
    architecture: str
    target: type | None
    provider: type[GPTModelProvider]
    model_type: str | None
    aliases: tuple[str, ...] = ()  # further model types that config.json may carry for the same model


_REGISTERED: dict[str, Registration] = {}


def _is_ours(bridge: type) -> bool:
    return bridge.__module__.startswith("bridges.families.")


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
    # For a model type that transformers does not have: fields that do not change what the forward computes. For its own
    # models, transformers' class shows what counts (bridges.config_reads).
    HF_INERT: ClassVar[frozenset[str]] = frozenset()

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
            bridge.registration = registration
            # Our families are imported late: a bridge that somebody registered before that stays.
            if not (
                _is_ours(bridge) and architecture in _REGISTERED and not _is_ours(_REGISTERED[architecture].bridge)
            ):
                _REGISTERED[architecture] = registration
            return bridge

        return register

    @staticmethod
    def supported() -> list[str]:
        return sorted(_REGISTERED)

    @staticmethod
    def registered(architectures: Sequence[str] | None, model_type: str | None = None) -> Registration | None:
        """The registration for a config's `architectures`, or without any for its model type, if there is one."""
        if architectures:
            return next((_REGISTERED[a] for a in architectures if a in _REGISTERED), None)
        named = (r for r in _REGISTERED.values() if model_type and model_type in (r.model_type, *r.aliases))
        return next(named, None)

    @staticmethod
    def find(config: PreTrainedConfig | Mapping[str, Any]) -> Registration:
        """The registration for a config, or for a config.json as it stands. ConfigError says what has a bridge instead: an
        architecture that is spelt almost the same, or the language model that is part of this one."""
        get: Any = config.get if isinstance(config, Mapping) else partial(getattr, config)
        architectures, model_type = get("architectures", None), get("model_type", None)
        if registration := MegatronModelBridge.registered(architectures, model_type):
            return registration
        listed = "(goldengate families lists them)"
        if not architectures:
            raise ConfigError(
                f"config.json names no architecture, and model type {model_type or '(none given)'} has no bridge {listed}"
            )
        near, text = near_miss(architectures[0], _REGISTERED), get("text_config", None)
        text_type = text.get("model_type") if isinstance(text, Mapping) else getattr(text, "model_type", None)
        part = MegatronModelBridge.registered(None, text_type)
        raise ConfigError(
            f"architecture {architectures[0]} has no bridge"
            + (f"; did you mean {near}?" if near else "")
            + (f"; its text_config alone has one, as {part.architecture}" if part else "")
            + f" {listed}"
        )

    # -- configuration -----------------------------------------------------------------------------------------------

    @classmethod
    def _rules(cls) -> tuple[Rule, ...]:
        return (*cls._BASE_RULES, *cls.CONFIG_RULES)

    @classmethod
    def check_config(cls, config: PreTrainedConfig, raw: dict | None = None) -> None:
        """Raise ConfigError that names every field of `config` (and of the file's own `raw`) for which no table accounts."""
        config_fields.check(config, raw, bridge=cls.__name__, **cls.field_tables())
        reader, unread = cls.unread_fields(config, raw)
        if unread:
            logger.info("not read by %s: %s", reader, ", ".join(unread))

    @classmethod
    def field_tables(cls) -> dict[str, Any]:
        """Return what the bridge's tables say of config fields: arguments of config_fields.check and config_fields.accounts."""
        ruled = {name for rule in cls._rules() for name in rule.hf}
        return {
            "known": {hf for hf, _ in cls.CONFIG_MAPPING} | ruled | {"hidden_act", "hidden_activation"},
            "fixed": cls.HF_FIXED,
            "required": cls.HF_FIELDS,
            "inert": cls.HF_INERT,
        }

    @classmethod
    def unread_fields(cls, config: PreTrainedConfig, raw: dict | None) -> tuple[str, list[str]]:
        """(transformers' class, the fields of config.json that neither it nor a rule about what it leaves out reads)."""
        return config_fields.unread(config, raw, {name for rule in cls._rules() if rule.unread for name in rule.hf})

    @classmethod
    def hf_config_to_provider_kwargs(cls, config: PreTrainedConfig) -> dict[str, Any]:
        """Provider fields from a config: CONFIG_MAPPING, the activation, then the rules.

        A field that transformers' class does not read is as good as absent, except for rules about what its class leaves
        out. Raises ConfigError for what a rule cannot build.
        """
        seen = reads(config)
        read: Any = Seen(config, seen) if seen else config
        kwargs = {}
        for hf, megatron in cls.CONFIG_MAPPING:
            if (value := getattr(read, hf, None)) is not None:
                kwargs[megatron] = value
        if (activation := getattr(read, "hidden_act", None) or getattr(read, "hidden_activation", None)) is not None:
            kwargs["activation_func"] = cls.hf_to_megatron_activation(activation)
        for rule in cls._rules():
            try:
                kwargs.update(rule.to_megatron(config if rule.unread else read))
            except UnreadError as error:
                if seen and any(name in seen for name in rule.hf):
                    raise ConfigError(f"config fields {', '.join(rule.hf)}: {error}") from error
                # else the rule is about parts that this model has not, as experts where all layers are dense
            except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
                if isinstance(error, GoldengateError):
                    raise
                raise ConfigError(f"config fields {', '.join(rule.hf)}: {' '.join(str(error).split())}") from error
        return kwargs

    def provider_bridge(self, hf_pretrained) -> GPTModelProvider:
        """The provider of a model; `hf_pretrained.config` is its config. Families rarely need to override this."""
        provider = self.registration.provider if self.registration else GPTModelProvider
        kwargs = {**self.MEGATRON_DEFAULTS, **self.hf_config_to_provider_kwargs(hf_pretrained.config)}
        if unknown := sorted(kwargs.keys() - {f.name for f in fields(provider)}):
            raise ConfigError(
                f"{provider.__name__} has no {', '.join(unknown)}, which this config asks for: register the bridge with a "
                "provider that has, such as bridges.mechanisms.decoder.DecoderProvider"
            )
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
        share = provider.hidden_size / provider.num_attention_heads
        if cls._absent_means_share(config.get("model_type") or "") and config.get("head_dim") == share:
            del config["head_dim"]
        return config

    @classmethod
    def _absent_means_share(cls, model_type: str) -> bool:
        """Does a config.json without head_dim mean an even share of the hidden size? Not where it must be there, and not
        where the config class has a number of its own."""
        declared = HF_CONFIG_CLASSES[model_type].__dataclass_fields__ if model_type in HF_CONFIG_CLASSES else {}
        default = declared.get("head_dim")
        return "head_dim" not in cls.HF_FIELDS and not isinstance(getattr(default, "default", None), int)

    @classmethod
    def _declared_fields(cls, model_type: str | None) -> set[str]:
        if cls.HF_FIELDS or not model_type or model_type not in HF_CONFIG_CLASSES:
            ruled = {name for rule in cls.CONFIG_RULES for name in rule.hf}
            return {*cls.HF_FIELDS, *cls.HF_FIXED, *ruled, "initializer_range"} if cls.HF_FIELDS else set()
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
