"""A target of `goldengate inspect`, read as far as it can be: a model without a bridge is one too."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

import toy_models
from bridges import hf_pretrained
from bridges.errors import GoldengateError, nearest_names
from bridges.hf_pretrained import is_safe_repo, load_config, read_config

TOWERS = re.compile(r"vision|visual|image|img|audio|speech|talker|code2wav|embd_layer")
HEARS, SEES = re.compile(r"audio|speech|talker|code2wav"), re.compile(r"vision|visual|image|img|embd_layer")
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


class InspectError(GoldengateError, ValueError):
    """A target that is nothing that could be inspected: the message names it."""


@dataclass(frozen=True)
class Source:
    """What was given: `raw` is its config.json, `config` transformers' reading of it or None with the `refusal`, `folder`
    where tensors may be. The language model's own fields are at `text_at`, a dotted path, "" for the top."""

    name: str
    raw: dict[str, Any]
    config: PreTrainedConfig | None
    refusal: str
    folder: Path | None
    text_at: str

    @property
    def architecture(self) -> str:
        return " ".join(map(str, self.raw.get("architectures") or []))

    @property
    def text(self) -> dict[str, Any]:
        """Return the fields of the language model, over those of the whole."""
        fields: Any = self.raw
        for key in filter(None, self.text_at.split(".")):
            fields = fields[key]
        return {**self.raw, **fields}

    @property
    def towers(self) -> list[str]:
        """Return the fields that describe what is beside the language model: a vision or an audio tower."""
        return [key for key, _ in nested(self.raw) if TOWERS.search(key) and "." not in key]

    @property
    def kind(self) -> str:
        """Return "language model", or what it sees and hears."""
        seen = [
            word for word, test in (("vision", SEES), ("audio", HEARS)) if any(map(test.search, self._tower_words()))
        ]
        return f"{'-'.join(seen)}-language model" if seen else "language model"

    def _tower_words(self) -> list[str]:
        return [key for key, _ in nested(self.raw) if TOWERS.search(key)]


def nested(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (dotted path, fields) of the objects in a config.json."""
    for key, value in fields.items():
        if isinstance(value, Mapping):
            yield f"{prefix}{key}", value
            yield from nested(value, f"{prefix}{key}.")


def text_path(raw: Mapping[str, Any]) -> str:
    """Return where the language model's fields are: the top, unless an object that is no tower counts the layers."""
    if any(raw.get(name) for name in LAYERS):
        return ""
    inner = [key for key, value in nested(raw) if any(value.get(name) for name in LAYERS) and not TOWERS.search(key)]
    return next((key for key in inner if re.search(r"text|llm|language", key)), inner[0] if inner else "")


def open_source(given: str, trust_remote_code: bool | None = None) -> Source:
    """Return what a row, a config.json, a folder that holds one or a hub id says; no tensor is read.

    Raises InspectError for what is none of them, CheckpointError for a file that holds no JSON object and a hub id that
    the cache does not have.
    """
    path, folder = Path(given), None
    if given in toy_models.rows() or toy_models.is_guest(given):
        raw, trusted = toy_models.config_dict(given), False
    elif path.is_file():
        raw, trusted = read_config(path), is_safe_repo(given, trust_remote_code)
    elif path.is_dir() or (given.count("/") == 1 and not given.startswith(("/", "."))):
        folder = path if path.is_dir() else hf_pretrained._hub_folder(given, False)
        if not (folder / "config.json").is_file():
            raise InspectError(f"{given} has no config.json: give a folder as save_pretrained writes it")
        raw, trusted = read_config(folder / "config.json"), is_safe_repo(given, trust_remote_code)
    else:
        near = nearest_names(given, toy_models.rows())
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InspectError(f"{given} is neither a row{hint} nor a config.json, a folder with one or a hub id")
    try:
        config, refusal = load_config(raw, folder or path, trusted), ""
    except GoldengateError as error:
        config, refusal = None, str(error)
    return Source(given, raw, config, refusal, folder, text_path(raw))
