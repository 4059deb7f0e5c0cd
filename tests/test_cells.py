"""Every row in every chosen layout: `pytest -k 'qwen3_moe and ep2'`, `pytest --row phi3 --layouts full`."""

from harness.pytest_plugin import test_cell

__all__ = ["test_cell"]
