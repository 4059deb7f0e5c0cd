"""Where things stand in a Megatron model: its layers, what is in one, the embedding and the output layer.

A provider says it with a `Walk`; conversions, checks and recordings ask it and name no container themselves. The default is
that of GPTModel. A model in another one's hands (a language model beside a vision tower) has a prefix, a hybrid layer has
a `mixer`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bridges.conversion.mapping import EMBEDDING, OUTPUT


@dataclass(frozen=True)
class Placed:
    """A layer of this rank: `path` in the chunk's modules, `stack` and `number` in the whole model, counted from 0."""

    path: str
    stack: str
    number: int
    module: Any

    @property
    def name(self) -> str:
        return f"{self.stack}.{self.number}"


@dataclass(frozen=True)
class Walk:
    """`model`: path of the language model, with its dot. `stacks`: paths of the lists of layers below it. `blocks`: what a
    layer has of each kind, by the names that Megatron may give it. `embedding` and `output`: paths below `model`."""

    model: str = ""
    stacks: tuple[str, ...] = ("decoder.layers",)
    blocks: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("self_attention", ("self_attention", "mixer")),
        ("mlp", ("mlp",)),
    )
    embedding: str = "embedding"
    output: str = "output_layer"

    @property
    def embedding_weight(self) -> str:
        """Return the name of the token embedding in the whole model."""
        return f"{self.model}{self.embedding}.{EMBEDDING.partition('.')[2]}"

    @property
    def output_weight(self) -> str:
        """Return the name of the output matrix in the whole model."""
        return f"{self.model}{self.output}.{OUTPUT.partition('.')[2]}"

    def layers(self, chunk: Any) -> Iterator[Placed]:
        """Yield the layers that this rank holds of the stacks, in order."""
        for stack in (self.model + stack for stack in self.stacks):
            for i, layer in enumerate(found(chunk, stack) or ()):
                yield Placed(f"{stack}.{i}", stack, self.number(layer), layer)

    def number(self, layer: Any) -> int:
        """Return a layer's number in the whole model, from 0; Megatron's own counts from 1."""
        return layer.layer_number - 1

    def blocks_of(self, layer: Any) -> Iterator[tuple[str, Any]]:
        """Yield (kind, module) of what a layer computes. Megatron fills a place that a layer does not use with an identity
        without parameters."""
        for kind, names in self.blocks:
            for name in names:
                module = getattr(layer, name, None)
                if module is not None and not type(module).__name__.startswith("Identity"):
                    yield kind, module
                    break

    def embedding_of(self, chunk: Any) -> Any:
        """Return the module that looks tokens up, None on a stage without."""
        return found(chunk, self.model + self.embedding) if chunk.pre_process else None

    def output_of(self, chunk: Any) -> Any:
        """Return the module that makes logits, None on a stage without."""
        return found(chunk, self.model + self.output)

    def layer_of(self, name: str) -> int | None:
        """Return the number of the layer that a parameter (by its name in the whole model) is in; None for none."""
        for stack in self.stacks:
            if match := re.match(re.escape(f"{self.model}{stack}") + r"\.(\d+)\.", name):
                return int(match[1])
        return None


def found(chunk: Any, path: str) -> Any:
    """Return the module at a path, None where there is none."""
    for name in path.split("."):
        chunk = getattr(chunk, name, None)
    return chunk


def unwrap(chunk: Any) -> Any:
    """Return the model below Megatron's wrappers (data parallelism, half precision)."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def walk_of(provider: Any) -> Walk:
    """Return what a provider says; the default for a configuration that is not one of ours."""
    return getattr(provider, "walk", None) or Walk()
