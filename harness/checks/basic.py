"""The checks of one row in one layout. Each asks one question and answers with a cell's status, value and detail.

A `Subject` is a row with everything that is the same in all layouts; a `Bench` is that row in one layout, on ranks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

import toy_models
from bridges import AutoBridge, Layout, LayoutError, MegatronModelBridge
from bridges.checkpoints.reader import Checkpoint, same_bytes, source_digest
from bridges.providers.cpu_backend import zigzag_positions
from harness.checks.localise import first_difference, hf_activations
from harness.ranks import jobs, training
from harness.ranks.pool import Ranks
from harness.reference import goldens
from harness.reference.compare import compare, relative_rms
from harness.reference.gradients import cotangents

CHECKS = ("config", "complete", "roundtrip", "logits", "reload", "grads")


class NotApplicable(Exception):
    """A check has no meaning for this row in this layout; the message says why. The cell is skipped."""


@dataclass(frozen=True)
class Outcome:
    """`ok`, the number compared with its limit, and a line that says what differed (or what was counted)."""

    ok: bool
    value: float | None
    limit: float | None
    unit: str
    detail: str


def first_few(lines: Sequence[str], most: int = 4) -> str:
    """The first `most` of what is wrong and how many more there are; empty for nothing."""
    return "; ".join(lines[:most]) + (f" (and {len(lines) - most} more)" if len(lines) > most else "")


@dataclass
class Subject:
    """A row: its checkpoint on disk, its golden, the bridge under test (None: the registered one)."""

    row: str
    folder: Path
    golden: goldens.Golden
    bridge: type[MegatronModelBridge] | None = None
    whole: jobs.Global | None = None  # the last layout's tensors, for the cross-layout round trip
    whole_from: str = ""
    digests: dict[str, Outcome] = field(default_factory=dict)
    bf16: tuple | None = None  # see harness.checks.bf16
    gradients: tuple[dict[str, torch.Tensor], list[str]] | None = None  # the reference's, kept by check_grads

    @classmethod
    def make(cls, row: str, folder: Path, bridge: type[MegatronModelBridge] | None = None) -> Subject:
        """Write the row's checkpoint below `folder` and load its golden; ValueError when that is stale."""
        golden = goldens.load(row)
        model = toy_models.build(row)
        config_hash = goldens.hash_config(toy_models.golden_key(row))
        if stale := goldens.check_fresh(row, config_hash, toy_models.weights_hash(model)):
            raise ValueError(stale)
        return cls(row, toy_models.write(row, folder / "hf"), golden, bridge)

    @cached_property
    def source(self) -> Checkpoint:
        return Checkpoint.open(self.folder)

    @cached_property
    def source_sha(self) -> str:
        return source_digest(self.source.path)

    @cached_property
    def auto_bridge(self) -> AutoBridge:
        return AutoBridge.from_hf_pretrained(self.source.path, bridge=self.bridge)

    @property
    def bridge_key(self) -> str | None:
        return None if self.bridge is None else f"{self.bridge.__module__}.{self.bridge.__qualname__}-{id(self.bridge)}"

    @cached_property
    def reference(self) -> PreTrainedModel:
        return toy_models.build(self.row)

    @cached_property
    def cotangent(self) -> torch.Tensor:
        """The gradients of the logits that every backward starts from."""
        return cotangents(self.row, [self.golden.logits, *self.golden.mtp_logits])


@dataclass
class Bench:
    """A subject in a layout. `build` comes first; the checks then use what it returned. `checks`: those that are to run, so
    that one forward serves several."""

    subject: Subject
    layout: Layout
    ranks: Ranks
    scratch: Path
    checks: Collection[str] = ()
    built: list[jobs.Built] = field(default_factory=list)
    exported: Path | None = None

    def run(self, job: Callable, *args: Any) -> list[Any]:
        return self.ranks.run(self.layout.world_size, job, *args)

    def check_possible(self) -> None:
        """LayoutError when the model does not divide into the layout, or the machine has too few GPUs for it."""
        self.subject.auto_bridge.to_megatron_provider(load_weights=False).apply_layout(self.layout).check_layout()
        if torch.cuda.is_available() and self.layout.world_size > torch.cuda.device_count():
            raise LayoutError(f"{self.layout} needs {self.layout.world_size} GPUs; {torch.cuda.device_count()} here")

    def check_fp32_attention(self) -> None:
        """NotApplicable where attention in fp32 is not to be had."""
        if torch.cuda.is_available() and self.layout.cp > 1:
            raise NotApplicable("Transformer Engine's attention has no fp32 kernel for context parallelism")

    def build(self) -> None:
        self.ranks.use_for(self.layout)
        _ = self.subject.source_sha  # taken before anything can touch the source
        self.built = self.run(jobs.build, str(self.subject.source.path), self.layout, self.subject.bridge_key)

    @cached_property
    def no_training(self) -> str:
        """Why Megatron does not train the model in this layout; empty where it does."""
        provider = self.subject.auto_bridge.to_megatron_provider(load_weights=False)
        if provider.num_moe_experts and self.layout.tp > 1 and not self.layout.sp:
            return "Megatron-Core refuses to train experts under tensor parallelism without sequence parallelism"
        return ""

    @cached_property
    def trained(self) -> list[training.Trained]:
        """A training step on every rank."""
        subject = self.subject
        return self.run(training.backward, subject.golden.inputs.numpy(), subject.cotangent.numpy())

    def forward(self) -> list[tuple[Any, np.ndarray | None]]:
        """(coordinates, logits) of every rank: of the training step where gradients are asked for too. On one rank always of
        a forward without gradients, in which Megatron does some things in place."""
        if self.layout.world_size > 1 and "grads" in self.checks and not self.no_training:
            return [(one.coords, one.logits) for one in self.trained]
        return self.run(jobs.forward, self.subject.golden.inputs.numpy())

    def export(self) -> Path:
        if self.exported is None:
            folder = self.scratch / f"{self.subject.row}-{self.layout}"
            self.run(jobs.export, str(folder))
            self.exported = folder
        return self.exported


# -- config ----------------------------------------------------------------------------------------------------------


def check_config(bench: Bench) -> Outcome:
    """HF config -> provider -> HF config through disk: every field of the original says the same, and a model built from
    the regenerated config alone computes the golden's logits."""
    subject = bench.subject
    auto = subject.auto_bridge
    provider = auto.to_megatron_provider(load_weights=False)
    original, inert = subject.source.config, auto._model_bridge.HF_INERT - {"model_type", "architectures"}
    regenerated = {
        **{k: v for k, v in original.items() if k in inert | set(auto._model_bridge.HF_FIXED)},  # carried over
        **json.loads(json.dumps(type(auto._model_bridge).megatron_to_hf_config(provider))),
    }
    before, after = (toy_models.hf_config(subject.row, c).to_dict() for c in (original, regenerated))
    fields = [f for f in sorted({*before, *after}) if f not in inert]
    wrong = [f"{f}: {after.get(f)!r} should be {before.get(f)!r}" for f in fields if before.get(f) != after.get(f)]
    config = toy_models.hf_config(subject.row, regenerated)
    model = type(subject.reference)._from_config(config, attn_implementation="eager")
    try:
        model.load_state_dict(subject.reference.state_dict(), strict=True)
    except RuntimeError as error:
        return Outcome(False, len(wrong) or 1, 0, "fields", "; ".join(wrong) or str(error).splitlines()[0])
    value = relative_rms(_logits(model.eval(), subject.golden.inputs), subject.golden.logits)
    if not value <= subject.golden.gate:
        wrong.append(f"a model of the regenerated config has other logits (relative RMS {value:.2g})")
    return Outcome(
        not wrong,
        len(wrong),
        0,
        "fields",
        "; ".join(wrong) or f"{len(fields)} fields say the same, logits differ by {value:.1e}",
    )


def _logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


# -- roundtrip -------------------------------------------------------------------------------------------------------


def check_roundtrip(bench: Bench) -> Outcome:
    """Import in another layout, reshard to this one by Megatron's own distributed-checkpoint metadata, export from here:
    the same names, shapes, dtypes, files and bits as the source, which is untouched."""
    subject = bench.subject
    origin, whole = subject.whole_from or str(bench.layout), subject.whole
    mine = gather_shards(bench.run(jobs.take_shards))
    differences: list[str] = []
    results = bench.run(jobs.put_shards, whole if whole is not None else mine)
    for rank, (_, names) in enumerate(results):
        differences += [f"rank {rank}: {name} as imported in {origin} differs from the import here" for name in names]
    subject.whole, subject.whole_from = mine, str(bench.layout)

    exported = bench.export()
    bench.run(jobs.restore)  # the other checks are about this layout's own import
    with Checkpoint.open(exported) as out:
        differences += same_bytes(subject.source, out)
        elements = sum(int(np.prod(i.shape)) for i in out.tensors.values())
    if source_digest(subject.source.path) != subject.source_sha:
        differences.append("the source checkpoint was changed")
    detail = first_few(differences)
    compared = sum(count for count, _ in results)
    return Outcome(
        not differences,
        len(differences),
        0,
        "tensors",
        detail or f"{origin} -> {bench.layout}: {compared} shards and {elements} elements bit-equal",
    )


def gather_shards(by_rank) -> jobs.Global:
    """The whole model from its main replicas."""
    whole: jobs.Global = {}
    for shards in by_rank:
        for key, shape, offset, values in shards:
            target = whole.setdefault(key, np.zeros(shape, values.dtype))
            target[tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))] = values
    return whole


# -- logits ----------------------------------------------------------------------------------------------------------


def check_logits(bench: Bench) -> Outcome:
    """Megatron's logits in this layout, of the main model and of every head of multi-token prediction, on every replica,
    against the golden."""
    bench.check_fp32_attention()
    golden = bench.subject.golden
    expected = [golden.logits, *golden.mtp_logits]
    replicas = assemble(bench.forward(), bench.layout, (len(expected), *golden.logits.shape))
    # Head k has seen k tokens more: the last k places have no token to see.
    results = [
        (compare(torch.from_numpy(replica[k][:, : want.shape[1]]), want, golden.gate), k)
        for replica in replicas
        for k, want in enumerate(expected)
    ]
    worst, head = max(results, key=lambda result: result[0].value)
    detail = (f"multi-token prediction head {head}: " if head else "") + worst.detail
    if not all(result.ok for result, k in results if k == 0):
        detail += "; " + localise(bench)
    elif worst.ok and golden.mtp_logits:
        detail += f"; {len(golden.mtp_logits)} head(s) of multi-token prediction among them"
    compared = len(results) == bench.layout.dp * len(expected)
    return Outcome(worst.ok and compared, worst.value, golden.gate, "rel rms", detail)


def assemble(by_rank, layout: Layout, shape) -> list[np.ndarray]:
    """Whole logits [heads, batch, sequence, vocab], one for each data-parallel replica; padded vocabulary columns dropped.

    ValueError when Megatron made another number of heads.
    """
    heads, _, length, vocab = shape
    replicas = [np.full(shape, np.nan, np.float32) for _ in range(layout.dp)]
    for coords, local in by_rank:
        if local is not None:
            if len(local) != heads:
                raise ValueError(
                    f"Megatron made logits of {len(local)} heads; the golden has {heads}, the main one included"
                )
            columns = slice(coords.tp * local.shape[-1], min((coords.tp + 1) * local.shape[-1], vocab))
            rows = zigzag_positions(length // layout.cp, coords.cp, layout.cp).numpy()
            replicas[coords.dp][:, :, rows, columns] = local[..., : columns.stop - columns.start]
    return replicas


def localise(bench: Bench) -> str:
    """Which module is the first that differs from Hugging Face, in this layout."""
    subject = bench.subject
    expected = hf_activations(subject.reference, subject.golden.inputs)
    return first_difference(
        expected, gathered(bench, jobs.activations, subject.golden.inputs.numpy()), subject.golden.gate
    )


def gathered(bench: Bench, job: Callable[[np.ndarray], jobs.Recorded], inputs: np.ndarray) -> dict[str, np.ndarray]:
    """What ranks recorded of modules, put together: {module: [batch, sequence, width]}."""
    layout, length = bench.layout, inputs.shape[1]
    whole: dict[str, np.ndarray] = {}
    for coords, found in bench.run(job, inputs):
        if coords.dp:
            continue
        for name, local in found.items():
            positions = zigzag_positions(length // layout.cp, coords.cp, layout.cp).numpy()
            if layout.sp:
                positions = np.split(positions, layout.tp)[coords.tp]
            empty = np.full((*inputs.shape, local.shape[-1]), np.nan, np.float32)
            whole.setdefault(name, empty)[:, positions] = local
    return whole


# -- reload ----------------------------------------------------------------------------------------------------------


def check_reload(bench: Bench) -> Outcome:
    """The exported folder loads in Hugging Face with no missing and no unexpected key, holds the same weights and computes
    the golden's logits. Folders with the same bytes are loaded once."""
    subject = bench.subject
    folder = bench.export()
    config = (folder / "config.json").read_bytes()
    digest = source_digest(folder) + hashlib.sha256(config).hexdigest()
    if digest not in subject.digests:
        subject.digests[digest] = _reload(subject, folder)
    return subject.digests[digest]


def _reload(subject: Subject, folder: Path) -> Outcome:
    golden = subject.golden
    model, info = toy_models.load(subject.row, folder, dtype=torch.float32, ignore_mismatched_sizes=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, info[problem])):
            return Outcome(False, len(keys), 0, problem.replace("_", " "), f"{problem}: {', '.join(keys[:4])}")
    if toy_models.weights_hash(model) != toy_models.weights_hash(subject.reference):
        found = model.state_dict()
        wrong = [n for n, t in subject.reference.state_dict().items() if not torch.equal(found[n], t)]
        return Outcome(False, len(wrong), 0, "tensors", f"other weights than the row's: {', '.join(wrong[:4])}")
    found = goldens.reference_logits(model.eval(), golden.inputs)
    result = max((compare(found[n], golden.tensors[n], golden.gate) for n in found), key=lambda c: c.value)
    return Outcome(result.ok, result.value, golden.gate, "rel rms", f"same weights; {result.detail}")
