"""What a check looks at: a row with everything that is the same in all layouts, and that row in one layout."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

import toy_models
from bridges import AutoBridge, Layout, LayoutError, MegatronModelBridge
from bridges.checkpoints.comparison import source_digest
from bridges.checkpoints.reader import Checkpoint
from harness.checks.outcome import NotApplicable, Outcome
from harness.ranks import jobs, training
from harness.ranks.pool import Ranks
from harness.reference import goldens
from harness.reference.gradients import cotangents


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
        """Write the row's checkpoint below `folder` and load its golden, which a guest row gets at once; ValueError when it is
        stale."""
        if toy_models.is_guest(row):
            golden = goldens.live(row)
            return cls(row, toy_models.write(row, folder / "hf"), golden, bridge)
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
