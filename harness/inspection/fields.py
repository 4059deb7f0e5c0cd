"""Which fields of a config nobody reads, and which no table knows, with the place where Hugging Face reads them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from bridges import config_fields
from bridges.config_reads import ConfigError, reads
from bridges.model_bridge import MegatronModelBridge
from harness.inspection.source import TOWERS, Source, nested


@dataclass(frozen=True)
class Unknown:
    """A field that counts and that no table knows; `read_at`: file, line and function, "" where there is no class."""

    name: str
    value: Any
    read_at: str


@dataclass(frozen=True)
class Fields:
    """`reader`: transformers' class, "" without one. `unread`: fields of the file that change nothing. `refused`: {field:
    (value, the one that is built)}. `missing`: what the file has to state. `tables`: whose tables were asked."""

    tables: str
    reader: str = ""
    unread: list[str] = field(default_factory=list)
    unknown: list[Unknown] = field(default_factory=list)
    refused: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    problem: str = ""


def _understood(name: str, value: Any, source: Source, known: Collection[str]) -> bool:
    """Is this an object whose fields are listed one by one, a field of a tower, or one of the language model's that the tables
    know by its last word?"""
    path, _, last = name.rpartition(".")
    if isinstance(value, Mapping) and any(name == at or at.startswith(f"{name}.") for at, _ in nested(source.raw)):
        return "rope" not in last
    if any(TOWERS.search(word) for word in path.split(".")):
        return True  # a tower is a mechanism of its own; its fields are not a decoder's
    return bool(path) and (last in known or config_fields.of_the_library(last, value))


def account(source: Source, bridge: type[MegatronModelBridge] | None) -> Fields:
    """Return the account of a target's fields by its bridge's tables, or without one by those that all bridges have."""
    asked: Any = bridge or MegatronModelBridge
    tables = bridge.__name__ if bridge else "the tables that all bridges have"
    if source.config is None:  # of code that is not run every field may count
        known = asked.field_tables()["known"]
        left = {n: v for n, v in source.text.items() if n not in known and not config_fields.of_the_library(n, v)}
        unknown = [Unknown(n, v, "") for n, v in left.items() if v is not None and not isinstance(v, Mapping)]
        return Fields(tables, unknown=unknown, problem=source.refusal)
    try:
        seen = reads(source.config)
        reader, unread = asked.unread_fields(source.config, source.raw)
        found = config_fields.accounts(source.config, source.raw, **asked.field_tables())
    except ConfigError as error:
        return Fields(tables, problem=str(error))
    except Exception as error:  # a config class whose fields cannot be looked at (Gemma 4's differ from layer to layer)
        return Fields(tables, problem=f"{type(source.config).__name__}: {str(error).split('. ')[0]}")
    known = asked.field_tables()["known"]
    unknown = [
        Unknown(name, value, seen.place(name) if seen else "")
        for name, value in found.unknown.items()
        if not _understood(name, value, source, known)
    ]
    return Fields(tables, reader, unread, unknown, found.refused, found.missing)
