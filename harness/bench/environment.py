"""Which machine, which versions, which commit: what a ledger line needs to be compared with another."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch",
    "megatron-core",
    "transformers",
    "transformer-engine",
    "fla-core",
    "triton",
    "tilelang",
)
ROOT = Path(__file__).parents[2]


def device() -> dict[str, Any]:
    """The first GPU, or the CPU. What nvidia-smi does not say is None."""
    if not torch.cuda.is_available():
        return {"name": _cpu_name(), "count": 1, "cores": len(os.sched_getaffinity(0))}
    asked = ("driver_version", "power.limit", "clocks.max.sm")
    said = _run("nvidia-smi", "-i", "0", f"--query-gpu={','.join(asked)}", "--format=csv,noheader,nounits")
    driver, power, clock = [w.strip() for w in said.split(",")] if said and said.count(",") == 2 else (None,) * 3
    return {
        "name": torch.cuda.get_device_name(0),
        "count": torch.cuda.device_count(),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory,
        "driver": driver,
        "power_cap_w": power,
        "max_clock_mhz": clock,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> tuple[str, bool | None]:
    """(commit of this tree, has it changes that are not committed); ("unknown", None) where there is no repository."""
    found = _run("git", "-C", str(ROOT), "rev-parse", "HEAD") if (ROOT / ".git").exists() else None
    if not found:
        return "unknown", None
    return found, bool(_run("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"))


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
