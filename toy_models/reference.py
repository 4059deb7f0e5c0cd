"""Rows of models that transformers has no class for: a native class that computes the same, under the published names.

A row's `_reference` says which, as data:

    "model_type"   the native class's
    "fields"       {published config field: native field, or null where the native class has none}
    "config"       native fields that no published field says
    "tensors"      [[regular expression on the native name, its replacement], ...], applied in this order

Native tensors that get the same published name lie in it one after the other (rows), in the order of "tensors".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch


def native_config(reference: Mapping | None, config: Mapping) -> dict:
    """The native class's config.json for a published one; without a reference they are the same."""
    if reference is None:
        return dict(config)
    fields = reference.get("fields", {})
    renamed = {fields.get(name, name): value for name, value in config.items() if fields.get(name, name) is not None}
    renamed.pop("auto_map", None)
    return {**renamed, **reference.get("config", {}), "model_type": reference["model_type"]}


def published_name(reference: Mapping | None, native: str) -> str:
    """The published name of a native tensor (as transformers writes it)."""
    for pattern, replacement in (reference or {}).get("tensors", ()):
        native = re.sub(pattern, replacement, native)
    return native


def _sources(reference: Mapping | None, names: Iterable[str]) -> dict[str, list[str]]:
    """{published name: its native tensors in order}, in the order of `names`."""
    patterns = [pattern for pattern, _ in (reference or {}).get("tensors", ())]

    def place(name: str) -> int:
        return next((i for i, pattern in enumerate(patterns) if re.search(pattern, name)), len(patterns))

    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(published_name(reference, name), []).append(name)
    return {name: sorted(natives, key=place) for name, natives in found.items()}


def publish(reference: Mapping | None, native: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Native tensors under their published names."""
    return {
        name: native[sources[0]] if len(sources) == 1 else torch.cat([native[s] for s in sources])
        for name, sources in _sources(reference, native).items()
    }


def restore(
    reference: Mapping | None, published: Mapping[str, torch.Tensor], shapes: Mapping[str, Sequence[int]]
) -> dict[str, torch.Tensor]:
    """The inverse: published tensors as the native ones of `shapes`. What has no native tensor, or not its number of rows,
    keeps its name, so that whoever loads it sees a key too many and the missing ones."""
    rest = dict(published)
    native = {}
    for name, sources in _sources(reference, shapes).items():
        rows = [shapes[s][0] for s in sources]
        if name in rest and (len(sources) == 1 or rest[name].shape[0] == sum(rows)):
            whole = rest.pop(name)
            native |= dict(zip(sources, whole.split(rows) if len(sources) > 1 else [whole], strict=True))
    return {**native, **rest}
