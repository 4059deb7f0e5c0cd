"""Every cell of our rows: `pytest`, `pytest --layouts full`, `pytest -k 'our_arcee and tp2'`, `pytest --run-gpu`."""

from harness.pytest_plugin import test_cell

__all__ = ["test_cell"]
