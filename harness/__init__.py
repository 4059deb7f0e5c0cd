"""The harness: rows, layouts, checks and reports. `verify` is the function behind `goldengate verify`."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`from harness import verify` without importing Megatron for those who only want, say, harness.reference.compare."""
    if name == "verify":
        from harness.sweep import verify

        return verify
    raise AttributeError(f"module 'harness' has no attribute {name!r}")
