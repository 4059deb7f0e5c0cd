"""Megatron's own ways to say how layers are spread over pipeline stages, as the one way of a provider.

They become `num_layers_per_chunk`; what that cannot say is refused by name.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from bridges.providers.lock import ProviderError

_WAY_OUT = "set provider.num_layers_per_chunk, the number of decoder layers of each chunk in model order"


def read_settings(provider: Any) -> None:
    """Read pipeline_model_parallel_layout and num_layers_in_{first,last}_pipeline_stage into num_layers_per_chunk.

    Raises ProviderError for one that cannot be honoured, and for two that contradict each other.
    """
    for name in ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"):
        if getattr(provider, name):
            raise ProviderError(f"provider.{name} is not built: {_WAY_OUT}")
    found = {}
    if provider.num_layers_per_chunk is not None:
        found["num_layers_per_chunk"] = tuple(provider.num_layers_per_chunk)
    if provider.pipeline_model_parallel_layout is not None:
        found["pipeline_model_parallel_layout"] = _of_layout(provider)
    ends = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
    if said := [name for name in ends if getattr(provider, name) is not None]:
        found[" and ".join(said)] = _of_ends(provider, said)
    if len(set(found.values())) > 1:
        texts = (f"{name} ({', '.join(map(str, split))} layers)" for name, split in found.items())
        raise ProviderError(f"provider's {' contradicts '.join(texts)}: set one of them")
    if found:
        provider.num_layers_per_chunk = next(iter(found.values()))
        provider.num_layers_in_first_pipeline_stage = provider.num_layers_in_last_pipeline_stage = None


def _of_layout(provider: Any) -> tuple[int, ...]:
    """Decoder layers of each chunk, model order, of Megatron's list or string."""
    given = provider.pipeline_model_parallel_layout
    name, pp = "provider.pipeline_model_parallel_layout", provider.pipeline_model_parallel_size
    try:
        parsed = PipelineParallelLayerLayout.from_str(given, pp) if isinstance(given, str) else given
        if not isinstance(parsed, PipelineParallelLayerLayout):
            parsed = PipelineParallelLayerLayout(given, pp)
    except (AssertionError, KeyError, ValueError) as error:
        raise ProviderError(f"{name}={given!r}: {' '.join(str(error).split())}") from error
    vpp = parsed.virtual_pipeline_model_parallel_size
    if vpp != (provider.virtual_pipeline_model_parallel_size or 1):
        raise ProviderError(
            f"{name}={given!r} has {vpp * pp} chunks: {vpp} for each of {pp} stages, where "
            f"virtual_pipeline_model_parallel_size is {provider.virtual_pipeline_model_parallel_size}"
        )
    chunks = [Counter(parsed.layout[stage][virtual]) for virtual in range(vpp) for stage in range(pp)]
    want = [Counter({LayerType.decoder: chunk[LayerType.decoder]}) for chunk in chunks]
    want[0][LayerType.embedding] += 1
    want[-1][LayerType.loss] += 1
    want[-1][LayerType.mtp] += provider.mtp_num_layers or 0
    if chunks != want:
        raise ProviderError(
            f"{name}={given!r}: only an embedding in the first chunk, and the heads of multi-token prediction and the loss in "
            "the last one are built"
        )
    return tuple(chunk[LayerType.decoder] for chunk in chunks)


def _of_ends(provider: Any, said: list[str]) -> tuple[int, ...]:
    pp, layers = provider.pipeline_model_parallel_size, provider.num_layers
    first, last = provider.num_layers_in_first_pipeline_stage, provider.num_layers_in_last_pipeline_stage
    names = " and ".join(f"provider.{name}={getattr(provider, name)}" for name in said)
    if pp < 2 or (provider.virtual_pipeline_model_parallel_size or 1) > 1:
        raise ProviderError(f"{names}: built for two stages or more, without virtual ones; otherwise {_WAY_OUT}")
    middle, left = pp - len(said), layers - (first or 0) - (last or 0)
    if left < 0 or (left % middle if middle else left):
        raise ProviderError(
            f"{names} leaves {left} of {layers} layers, which {middle} other stages cannot share evenly"
        )
    share = [left // middle] * middle if middle else []
    return (*([first] if first is not None else []), *share, *([last] if last is not None else []))
