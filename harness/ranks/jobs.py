"""What ranks do in a cell. Every function here runs on all ranks of a layout at once; the harness compares outside.

The model of the current cell stays in the rank between the jobs of a cell (build, forward, export).
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.pipeline_parallel import get_forward_backward_func

from bridges import AutoBridge, Layout
from bridges.conversion.tasks import current_layout, global_tensors
from bridges.conversion.walk import unwrap, walk_of
from bridges.providers.core_attention import zigzag_positions
from bridges.providers.groups import ensure_process_groups
from bridges.providers.provider import GPTModelProvider

# Bridges under test that are not registered: set before the ranks are forked, which inherit them.
INHERITED_BRIDGES: dict[str, type] = {}


@dataclass
class Current:
    bridge: AutoBridge
    provider: GPTModelProvider
    chunks: list
    imported: list[torch.Tensor] = field(default_factory=list)  # kept by put_shards, for restore

    def keyed_chunks(self) -> list[tuple[str, Any]]:
        """Model chunks under the keys that Megatron's checkpoints use."""
        return (
            [("model", self.chunks[0])]
            if len(self.chunks) == 1
            else [(f"model{i}", c) for i, c in enumerate(self.chunks)]
        )


_current: Current | None = None
_groups: tuple | None = None


def use_layout(layout: Layout) -> None:
    """Megatron's groups for a layout; kept when the next cell has the same sizes."""
    global _groups
    key = (layout.tp, layout.pp, layout.cp, layout.ep, layout.expert_tp, layout.dp)
    if key != _groups and parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    _groups = key


def device() -> torch.device:
    """Where this rank's model is."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def set_current(value: Current) -> None:
    global _current
    _current = value


def current() -> Current:
    assert _current is not None, "build first"
    return _current


@dataclass(frozen=True)
class Built:
    """What a rank holds: (global name, shape, dtype) of each parameter; NaNs found after import; seconds and memory."""

    parameters: tuple[tuple[str, tuple[int, ...], str], ...]
    unwritten: tuple[str, ...]
    coords: Any
    seconds: float
    peak_mib: float


def build(folder: str, layout: Layout, bridge_key: str | None = None, dtype: torch.dtype | None = None) -> Built:
    """Build the model of a checkpoint in a layout (in another dtype maybe), poison it with NaN, import the checkpoint."""
    global _current
    start = time.perf_counter()
    _current = None
    use_layout(layout)
    bridge = AutoBridge.from_hf_pretrained(folder, bridge=INHERITED_BRIDGES[bridge_key] if bridge_key else None)
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.perform_initialization = False
    if dtype is not None:
        provider.params_dtype, provider.bf16 = dtype, dtype == torch.bfloat16
    deterministic = provider.params_dtype == torch.float32 and bool(provider.experimental_attention_variant)
    provider.deterministic_mode = deterministic  # Megatron's plain PyTorch: fla's kernels are made for 16 bits
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = str(
        int(not deterministic)
    )  # and Transformer Engine wants to be told
    provider.apply_layout(layout).finalize()
    ensure_process_groups(provider, layout)
    chunks = provider.provide_distributed_model(wrap_with_ddp=False)
    for chunk in chunks:
        chunk.eval()
    poison(chunks)
    bridge.load_hf_weights(chunks, lossy=dtype is not None)
    _current = Current(bridge, provider, chunks)
    named = list(global_tensors(chunks))
    unwritten = tuple(n for n, t in named if t.is_floating_point() and bool(t.isnan().any()))
    _, coords = current_layout(provider)
    return Built(
        tuple((n, tuple(t.shape), str(t.dtype)) for n, t in named),
        unwritten,
        coords,
        time.perf_counter() - start,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )


@torch.no_grad()
def poison(chunks) -> None:
    """NaN in every parameter and persistent buffer: what the import does not write shows."""
    for _, tensor in global_tensors(chunks):
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))


Recorded = tuple[Any, dict[str, np.ndarray]]


def activations(input_ids: np.ndarray) -> Recorded:
    """(coordinates, {module by its place in the whole model: output [batch, local sequence, hidden]}) of this rank."""
    walk, modules = walk_of(current().provider), {}
    for chunk in current().chunks:
        if (embedding := walk.embedding_of(chunk)) is not None:
            modules["embedding"] = embedding
        for layer in walk.layers(chunk):
            modules |= {f"layers.{layer.number}.{kind}": module for kind, module in walk.blocks_of(layer.module)}
    return _recorded(input_ids, modules, lambda args, output: _with_bias(output))


def _with_bias(output: Any) -> torch.Tensor:
    """A block's output; Megatron gives the bias of its last linear beside it and adds that later."""
    if not isinstance(output, tuple):
        return output
    value, *bias = output
    return value + bias[0] if bias and bias[0] is not None else value


def choices(input_ids: np.ndarray) -> Recorded:
    """(coordinates, {router by its layer: 1 for each expert chosen [batch, local sequence, experts]}) of this rank."""
    walk, modules = walk_of(current().provider), {}
    for layer in (layer for chunk in current().chunks for layer in walk.layers(chunk)):
        routers = [module.router for _, module in walk.blocks_of(layer.module) if hasattr(module, "router")]
        modules |= {f"layers.{layer.number}.router": router for router in routers}
    return _recorded(input_ids, modules, lambda args, output: output[1].view(*args[0].shape[:2], -1))


def _recorded(input_ids: np.ndarray, modules: dict[str, Any], pick: Callable[[Any, Any], torch.Tensor]) -> Recorded:
    """What `pick(arguments, output)` takes of each module in a forward: [local sequence, batch, width] by microbatch."""
    _, coords = current_layout(current().provider)
    found: dict[str, list[torch.Tensor]] = {}

    def hook(name):
        def save(module, args, output):
            # A copy: without gradients Megatron adds the residual to this very tensor.
            found.setdefault(name, []).append(pick(args, output).detach().float().transpose(0, 1).clone())

        return save

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        forward(input_ids)
    finally:
        for handle in handles:
            handle.remove()
    # Heads of multi-token prediction look tokens up too, after the main model in each microbatch.
    first = {name: pieces[:: max(1, len(pieces) * len(pieces[0]) // len(input_ids))] for name, pieces in found.items()}
    return coords, {name: torch.cat(pieces).roll(coords.dp, 0).cpu().numpy() for name, pieces in first.items()}


@contextmanager
def recorded_heads(chunks) -> Iterator[list[torch.Tensor]]:
    """Logits [local sequence, batch, local vocabulary] in the order in which the output layer makes them: for each
    microbatch the heads of multi-token prediction, then the main model's. Megatron makes
    losses of the heads' at once, and does so in place."""
    found: list[torch.Tensor] = []
    heads = [walk_of(unwrap(chunk).config).output_of(unwrap(chunk)) for chunk in chunks]
    layers = [head for head in heads if head is not None]
    handles = [
        layer.register_forward_hook(lambda module, args, output: found.append(output[0].clone())) for layer in layers
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Microbatches:
    """This rank's part of the sequences, as many microbatches as stages: `tokens` [sequences, local sequence] of each.

    Each data-parallel rank takes the sequences in another order, so that ranks that exchange tokens do not hold the same
    ones.
    """

    layout: Layout
    coords: Any
    length: int
    positions: torch.Tensor  # [local sequence]
    tokens: list[torch.Tensor]

    @classmethod
    def of(cls, input_ids: np.ndarray) -> Microbatches:
        """Of [batch, sequence]. ValueError for a sequence that cannot be cut for the layout."""
        layout, coords = current_layout(current().provider)
        batch, length = input_ids.shape
        if length % (layout.cp * 2 if layout.cp > 1 else 1) or (length // layout.cp) % (layout.tp if layout.sp else 1):
            raise ValueError(f"{length} tokens cannot be cut for cp={layout.cp}, tp={layout.tp} with sp={layout.sp}")
        positions = zigzag_positions(length // layout.cp, coords.cp, layout.cp).to(device())
        ids = torch.from_numpy(input_ids).roll(-coords.dp, 0).to(device())
        return cls(layout, coords, length, positions, list(ids[:, positions].split(max(batch // layout.pp, 1))))

    def run(self, chunks: Sequence, step: Callable[[torch.Tensor, int], Any], **options: Any) -> None:
        """Megatron's own schedule; `step(output of the last stage, number of the microbatch)` says what it is given."""
        position_ids = self.positions[None].expand(self.tokens[0].shape)

        def forward_step(numbers, model):
            n = next(numbers)
            return model(self.tokens[n], position_ids, None), lambda output, *rest, **_: step(output, n)

        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(range(len(self.tokens))) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(self.tokens),
            seq_length=self.length,
            micro_batch_size=self.tokens[0].shape[0],
            **options,
        )


def forward(input_ids: np.ndarray) -> tuple[Any, np.ndarray | None]:
    """(coordinates, logits [1 + heads, batch, local sequence, local vocabulary] of a rank on the last stage, else None):
    the main model's first, then those of its heads of multi-token prediction."""
    chunks, data = current().chunks, Microbatches.of(input_ids)
    with torch.no_grad(), recorded_heads(chunks) as made:
        data.run(chunks, lambda output, n: output, forward_only=True, collect_non_loss_data=True)
    if data.coords.pp != data.layout.pp - 1:
        return data.coords, None
    heads = len(made) // len(data.tokens)
    order = [heads - 1, *range(heads - 1)]
    whole = torch.stack([torch.cat(made[h::heads], dim=1).transpose(0, 1).float() for h in order])
    return data.coords, whole.roll(data.coords.dp, 1).cpu().numpy()


def export(folder: str) -> None:
    """Write the current model as a Hugging Face folder."""
    this = current()
    this.bridge.save_hf_pretrained(this.chunks, folder)


# -- across layouts --------------------------------------------------------------------------------------------------

Global = dict[str, np.ndarray]


def sharded_tensors() -> list[Any]:
    """This rank's tensors as Megatron's own distributed checkpointing describes them: key, global shape, offset."""
    found = []
    for chunk in current().chunks:
        state = chunk.sharded_state_dict()
        apply_factories(state)
        found += [value for value in nested_values(state) if isinstance(value, ShardedTensor)]
    return found


def take_shards() -> list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]]:
    """(key, global shape, offset, values) of every shard of which this rank holds the main replica."""
    out = []
    for shard in sharded_tensors():
        if is_main_replica(shard.replica_id):
            values = _with_axes(shard, shard.data.detach()).cpu().numpy().copy()
            out.append((shard.key, tuple(shard.global_shape), tuple(shard.global_offset), values))
    return out


def _with_axes(shard: ShardedTensor, data: Any) -> torch.Tensor:
    return data.reshape((1,) * shard.prepend_axis_num + tuple(data.shape))


def put_shards(whole: Global) -> tuple[int, list[str]]:
    """Poison the current model, fill it from another layout's tensors by Megatron's own offsets, and compare with what
    this layout's import had written: (tensors compared, names that differ)."""
    before = [(n, t.detach().clone()) for n, t in global_tensors(current().chunks)]
    current().imported = [t for _, t in before]
    poison(current().chunks)
    with torch.no_grad():
        for shard in sharded_tensors():
            source = whole[shard.key]
            view = _with_axes(shard, shard.data)
            box = tuple(slice(o, o + n) for o, n in zip(shard.global_offset, view.shape, strict=True))
            piece = torch.from_numpy(source[box])
            view.zero_() if piece.shape != view.shape else None  # rows of vocabulary padding the other layout lacks
            view[tuple(slice(0, n) for n in piece.shape)].copy_(piece)
    differ = [
        n
        for (n, old), (_, new) in zip(before, global_tensors(current().chunks), strict=True)
        if not torch.equal(old, new)
    ]
    return len(before), differ


@torch.no_grad()
def restore() -> None:
    """Undo `put_shards`: the current model holds this layout's own import again."""
    for (_, tensor), imported in zip(global_tensors(current().chunks), current().imported, strict=True):
        tensor.copy_(imported)
