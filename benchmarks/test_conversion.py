"""Import and export of a checkpoint on this machine: bytes per second."""

import pytest

from harness.bench.conversion import Conversion


@pytest.fixture(scope="module")
def conversion(machine, tmp_path_factory):
    return Conversion(machine, tmp_path_factory.mktemp("conversion"))


@pytest.mark.parametrize("direction", ["import", "export"])
def test_conversion(direction, conversion, ceiling, fresh_memory, benchmark, keep):
    """The files are in the page cache; export writes new ones."""
    keep(conversion.measure(direction, ceiling, benchmark.pedantic))
