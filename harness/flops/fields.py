"""Reading a Megatron configuration: every field by its name, with its type, or an error that says what is wrong.

No fallback values: a calculator that guesses a missing field reports a number for another model.
"""

from __future__ import annotations

from typing import Any

from bridges.errors import GoldengateError


class FlopsError(GoldengateError, ValueError):
    """The configuration cannot be counted: a field is missing, has the wrong type or the wrong length."""


class Fields:
    """A TransformerConfig (a provider is one), read field by field."""

    def __init__(self, config: Any):
        self.config = config

    def get(self, name: str) -> Any:
        try:
            return getattr(self.config, name)
        except AttributeError:
            raise FlopsError(
                f"{type(self.config).__name__} has no field {name!r}, which its FLOPs depend on: give a Megatron "
                "provider or TransformerConfig of this kind of model"
            ) from None

    def integer(self, name: str, *, least: int = 1) -> int:
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise FlopsError(
                f"{name} is {value!r}, a whole number is needed"
                + (": finalize() the provider, which derives it" if value is None else "")
            )
        if value < least:
            raise FlopsError(f"{name} is {value}, at least {least} is needed")
        return value

    def optional(self, name: str, *, least: int = 1) -> int | None:
        """A whole number, or None where None is a value of its own (no experts, no query latent)."""
        return None if self.get(name) is None else self.integer(name, least=least)

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if not isinstance(value, bool):
            raise FlopsError(f"{name} is {value!r}, True or False is needed")
        return value

    def pattern(self, name: str, layers: int) -> int | list[int]:
        """A frequency (a whole number) or a list of 0 and 1, one a layer."""
        value = self.get(name)
        if isinstance(value, list | tuple):
            wrong = [v for v in value if isinstance(v, bool) or v not in (0, 1)]
            if wrong:
                raise FlopsError(f"{name} holds {wrong[0]!r}: a pattern is made of 0 and 1")
            if len(value) != layers:
                raise FlopsError(f"{name} has {len(value)} entries, the model {layers} layers")
            return list(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise FlopsError(f"{name} is {value!r}: a whole number or a list of {layers} entries is needed")
        if value < 1:
            raise FlopsError(f"{name} is {value}, at least 1 is needed")
        return value


# -- which layer is what ---------------------------------------------------------------------------------------------


def moe_layers(f: Fields) -> list[bool]:
    """Per layer: does it have experts? Megatron counts its frequency from the first layer."""
    layers = f.integer("num_layers")
    if f.optional("num_moe_experts") is None:
        return [False] * layers
    pattern = f.pattern("moe_layer_freq", layers)
    return [i % pattern == 0 for i in range(layers)] if isinstance(pattern, int) else [p == 1 for p in pattern]


def linear_attention_layers(f: Fields) -> list[bool]:
    """Per layer: is its attention linear? With the whole number N every Nth layer has softmax attention."""
    layers = f.integer("num_layers")
    if f.get("experimental_attention_variant") != "gated_delta_net":
        return [False] * layers
    pattern = f.pattern("linear_attention_freq", layers)
    return [(i + 1) % pattern != 0 for i in range(layers)] if isinstance(pattern, int) else [p == 1 for p in pattern]


def window(f: Fields, layer_number: int) -> int | None:
    """How many keys, itself included, a query of this layer (counted from 1) sees at most; None: all before it."""
    size = f.get("window_size")
    if not size:
        return None
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(isinstance(s, int) for s in size):
        raise FlopsError(f"window_size is {size!r}: a pair (tokens before, tokens after) is needed")
    left, right = size
    if right > 0:
        raise FlopsError(f"window_size is {size!r}: a causal model does not look ahead")
    layers = f.integer("num_layers")
    if f.get("window_attn_skip_freq") is not None:
        skip = f.pattern("window_attn_skip_freq", layers)
        windowed = layer_number % skip != 0 if isinstance(skip, int) else skip[layer_number - 1] == 1
        if not windowed:
            return None
    return None if left < 0 else left + 1
