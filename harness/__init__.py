"""The harness: rows, layouts, checks and reports. `verify` is the function behind `goldengate verify`."""

import os
from typing import Any

# The parent of the ranks asks whether there is a GPU and must not start CUDA by asking: its children could not use it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
# Triton multiplies fp32 in TF32 unless it is told not to: fla's kernels would differ by 1e-3 from a right model.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")


def __getattr__(name: str) -> Any:
    """`from harness import verify` without importing Megatron for those who only want, say, harness.reference.compare."""
    if name == "verify":
        from harness.sweep import verify

        return verify
    raise AttributeError(f"module 'harness' has no attribute {name!r}")
