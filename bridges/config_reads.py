"""Which fields of a config the transformers class reads: recorded, not listed.

The class is built on the meta device under the very config and runs one short forward there, so that a config of any size
costs no memory. A config whose attribute access notes the name stands in for the real one; dicts in it note their keys.
What the config does for itself (validation, `to_dict`) is not the model reading it. A field that nobody reads cannot change
what is computed, whatever its value; tests confirm it on real models by changing the values (tests/test_config_reads.py).
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from types import FrameType
from typing import Any

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig, PreTrainedModel, modeling_rope_utils
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bridges.errors import GoldengateError

logger = logging.getLogger("goldengate")

# Code that works on configs and is no model: what it reads says nothing about what is computed.
_NO_MODEL = (transformers.configuration_utils.__file__, transformers.generation.configuration_utils.__file__)
_CACHE: dict[tuple[type, str], Reads | None] = {}


class ConfigError(GoldengateError, ValueError):
    """A config.json that the bridge cannot account for: the message names the field."""


class UnreadError(AttributeError):
    """A field that transformers' class does not read, so that as far as the model goes it is not there."""


@dataclass(frozen=True)
class Reads:
    """The fields that the class `reader` reads under one config: names as in `attribute_map`'s values, those of nested
    configs and of dicts dotted (`text_config.hidden_size`, `rope_parameters.factor`). `places` says of each where it is
    read first: file, line and function."""

    reader: str
    names: frozenset[str]
    attribute_map: tuple[tuple[str, str], ...] = ()
    places: tuple[tuple[str, str], ...] = ()

    def place(self, name: str) -> str:
        """Return where a field is read first, "" for one that is not read."""
        return dict(self.places).get(dict(self.attribute_map).get(name, name), "")

    def __contains__(self, name: str) -> bool:
        """Is this field, under its own name or another that `attribute_map` gives it, read?"""
        return dict(self.attribute_map).get(name, name) in self.names


class Seen:
    """A config of which only the fields that its class reads are there; in dicts, only the keys that are used."""

    def __init__(self, config: PreTrainedConfig, reads: Reads):
        self._config, self._reads = config, reads

    def __getattr__(self, name: str) -> Any:
        if name not in self._reads:
            raise UnreadError(f"{self._reads.reader} does not read {name}")
        value = getattr(self._config, name)
        if isinstance(value, dict):
            return {key: one for key, one in value.items() if f"{name}.{key}" in self._reads.names}
        return value


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """transformers' own class for a config: the one that `architectures` names, or without it the language model of the
    config's model type; None where transformers has none."""
    names = getattr(config, "architectures", None) or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)]
    for name in names:
        found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
        if (
            inspect.isclass(found)
            and issubclass(found, PreTrainedModel)
            and isinstance(config, found.config_class or ())
        ):
            return found
    return None


def reads(config: PreTrainedConfig) -> Reads | None:
    """What the config's class reads under it; None where transformers has no class, or where it cannot run on the meta
    device (which is logged). ConfigError for a config under which the class cannot even be built."""
    if (model := model_class(config)) is None:
        return None
    key = (model, json.dumps(config.to_dict(), sort_keys=True, default=str))
    if key not in _CACHE:
        _CACHE[key] = _record(config, model)
    return _CACHE[key]


def _record(config: PreTrainedConfig, kind: type[PreTrainedModel]) -> Reads | None:
    names: dict[str, str] = {}
    small = copy.deepcopy(config)
    if (getattr(small, "pad_token_id", None) or 0) >= getattr(small, "vocab_size", math.inf):
        small.pad_token_id = None  # torch refuses it; it says which row of the embedding gets no gradient
    noting = _noting(small, "", names)
    with _plain_functions(kind.__module__), torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            with torch.device("meta"):
                model = kind._from_config(noting, attn_implementation="eager", experts_implementation="batched_mm")
        except Exception as error:
            raise ConfigError(
                f"{kind.__name__} cannot be built from this config: {type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
        try:
            _run(model.eval())
        except Exception as error:
            logger.warning(
                "%s does not run on the meta device (%s), so every config field has to be known",
                kind.__name__,
                " ".join(str(error).split())[:200],
            )
            return None
    return Reads(kind.__name__, frozenset(names), tuple(config.attribute_map.items()), tuple(names.items()))


def _run(model: PreTrainedModel) -> None:
    """Initialise and run what differs, once for each answer to questions about values, which the meta device lacks."""
    skipped = {id(module) for layer in _skip_repeated_layers(model) for module in layer.modules()}
    for module in model.modules():
        if id(module) not in skipped:
            model._init_weights(module)
    ids = torch.zeros(1, 5, dtype=torch.long, device="meta")
    for answer in (False, True):
        with _Answer(answer):
            model(ids, use_cache=False)


class _Answer(TorchDispatchMode):
    """Every `bool(tensor)` or `tensor.item()` gives the same answer."""

    def __init__(self, answer: bool):
        super().__init__()
        self.answer = answer

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.answer
        return func(*args, **(kwargs or {}))


@contextmanager
def _plain_functions(module: str) -> Iterator[None]:
    """transformers' PyTorch functions where it would take GPU kernels of another package, which know no meta device."""
    names = vars(sys.modules[module])
    wrapped = {n: f for n, f in names.items() if inspect.isfunction(f) and hasattr(f, "__wrapped__")}
    try:
        names.update({name: inspect.unwrap(function) for name, function in wrapped.items()})
        yield
    finally:
        names.update(wrapped)


# -- layers that are the same ----------------------------------------------------------------------------------------


def _skip_repeated_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Of layers that are the same but for their number only the first runs; the others, which are returned, give what it
    gave."""
    skipped = []
    for stack in [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]:
        first: dict[str, torch.nn.Module] = {}
        for layer in stack:
            same = first.setdefault(_structure(layer), layer)
            if same is layer:
                layer.register_forward_hook(_keep_output)
            else:
                layer.forward = _Returned(same)  # type: ignore[method-assign]
                skipped.append(layer)
    return skipped


def _keep_output(module: torch.nn.Module, args: Any, output: Any) -> None:
    module.kept_output = output  # type: ignore[assignment]


@dataclass
class _Returned:
    layer: torch.nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer.kept_output


def _structure(layer: torch.nn.Module) -> str:
    """Classes, plain attributes and shapes of everything in a layer but its number."""
    found = []
    for name, module in layer.named_modules():
        plain = {k: v for k, v in vars(module).items() if v is None or isinstance(v, int | float | str | tuple)}
        plain.pop("layer_idx", None)
        shapes = [(n, tuple(p.shape)) for n, p in module.named_parameters(recurse=False)]
        found.append((name, type(module).__qualname__, sorted(plain.items()), shapes))
    return repr(found)


# -- noting ----------------------------------------------------------------------------------------------------------


def _noting(config: PreTrainedConfig, prefix: str, names: dict[str, str]) -> PreTrainedConfig:
    """The config itself, made to note what a model reads of it."""
    kind = type(config)

    def getattribute(self, key: str) -> Any:
        if not key.startswith("__") and (place := _by_a_model(sys._getframe(1))):
            names.setdefault(prefix + kind.attribute_map.get(key, key), place)
        return kind.__getattribute__(self, key)

    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            _noting(value, f"{prefix}{key}.", names)
        elif isinstance(value, dict):
            vars(config)[key] = _NotingDict(value, f"{prefix}{key}.", names)
    # Made without PreTrainedConfig's own __init_subclass__, which would turn the class into another dataclass.
    noting = type.__new__(type(kind), kind.__name__, (_Quiet, kind), {"__getattribute__": getattribute})
    noting.__module__ = kind.__module__
    object.__setattr__(config, "__class__", noting)
    return config


class _Quiet:
    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Nothing: stands before PreTrainedConfig's."""


class _NotingDict(dict):
    """A dict that notes the keys that a model uses."""

    def __init__(self, values: dict, prefix: str, names: dict[str, str]):
        super().__init__(values)
        self._note = (prefix, names)
        for key, value in values.items():
            if isinstance(value, dict):
                super().__setitem__(key, _NotingDict(value, f"{prefix}{key}.", names))

    def _used(self, *keys: Any) -> None:
        if place := _by_a_model(sys._getframe(2)):
            prefix, names = self._note
            for key in keys:
                names.setdefault(f"{prefix}{key}", place)

    def __deepcopy__(self, memo: dict) -> _NotingDict:
        return _NotingDict(copy.deepcopy(dict(super().items()), memo), *self._note)

    def __getitem__(self, key: Any) -> Any:
        self._used(key)
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        self._used(key)
        return super().get(key, default)

    def __contains__(self, key: Any) -> bool:
        self._used(key)
        return super().__contains__(key)

    def __iter__(self) -> Iterator:
        self._used(*super().keys())
        return super().__iter__()

    def keys(self):
        self._used(*super().keys())
        return super().keys()

    def items(self):
        self._used(*super().keys())
        return super().items()

    def values(self):
        self._used(*super().keys())
        return super().values()


def _by_a_model(frame: FrameType | None) -> str:
    """Return the place of the code in `frame` if it reads for a model, else "". What a config's own methods read counts for
    whoever calls them, except those that every config has."""
    while frame is not None and isinstance(frame.f_locals.get("self"), PreTrainedConfig):
        if frame.f_code.co_filename in (*_NO_MODEL, modeling_rope_utils.__file__):
            return ""
        frame = frame.f_back
    if frame is None or frame.f_code.co_filename in _NO_MODEL:
        return ""
    return f"{PurePath(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_qualname}"
