"""Import and export of a dense checkpoint, as a case."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from bridges import AutoBridge
from harness.bench.cases import CONVERSION
from harness.bench.ledger import Record
from harness.bench.measure import LOOP, Ceiling, Clock, roofline
from harness.bench.run import Runner, named, timed
from harness.bench.subject import Machine
from toy_models import write_config_checkpoint

ROUNDS = 5


class Conversion:
    """A checkpoint of random weights, and the model that it is read into and written from."""

    def __init__(self, machine: Machine, folder: Path):
        self.machine, self.folder = machine, folder
        config = CONVERSION.config(toy=machine.toy)
        dtype = getattr(torch, config["torch_dtype"])
        self.source = write_config_checkpoint(config, folder / "source", dtype=dtype, max_shard_bytes=1 << 32)
        self.nbytes = sum(file.stat().st_size for file in self.source.glob("*.safetensors"))
        self.bridge = AutoBridge.from_hf_pretrained(self.source)
        provider = self.bridge.to_megatron_provider(load_weights=False)
        provider.perform_initialization = False
        self.chunks = provider.finalize().provide_distributed_model(wrap_with_ddp=False)
        self.settings = {"config": config, "loop": LOOP, "device_type": machine.device.type, "bytes": self.nbytes}

    def measure(self, direction: str, ceiling: Ceiling, runner: Runner) -> Record:
        """`import` or `export`."""
        target = self.folder / "exported"

        def step(i: int) -> None:
            if direction == "import":
                self.bridge.load_hf_weights(self.chunks)
            else:
                self.bridge.save_hf_pretrained(self.chunks, target)

        def clean() -> None:
            shutil.rmtree(target, ignore_errors=True)

        clock = Clock(self.machine.device, 1, step, lambda: None)
        self.bridge.load_hf_weights(self.chunks)
        clock.round()
        clock.seconds.clear()
        runner(clock.round, setup=clean, rounds=ROUNDS, iterations=1)
        clean()
        found = timed(clock.seconds)
        # Read once and written once, in main memory: the best that a copy could do.
        host = replace(ceiling, bytes_per_s=ceiling.host_bytes_per_s)
        return {
            **found,
            **named(f"conversion.{direction}", self.settings),
            "flops": {"convention": "hardware", "kernels": None, "total": 0, "by_part": {}, "causal_total": 0},
            "bytes": 2 * self.nbytes,
            "tflops": None,
            "fraction_of_ceiling": None,
            "bytes_per_s": self.nbytes / found["median_s"],
            "roofline": roofline(0, 2 * self.nbytes, host),
            "peak_bytes": None,
        }
