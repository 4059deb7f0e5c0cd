"""What a command imports before it says its first word."""

import json
import os
import subprocess
import sys

import pytest
import torch

from harness.cli import main
from harness.startup import compiler_deferred

HEAVY = ("torch", "transformers", "megatron", "numpy")

AFTER = """
import json, sys
from harness.cli import main
sys.argv = ["goldengate", *sys.argv[1:]]
try:
    main()
except SystemExit:
    pass
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def imported_by(*args: object) -> set[str]:
    """The modules that a fresh interpreter holds after a command."""
    command = [sys.executable, "-c", AFTER, *map(str, args)]
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert ended.stdout.strip(), ended.stderr
    return set(json.loads(ended.stderr.splitlines()[-1]))


@pytest.mark.parametrize("args", [["--version"], ["--help"]])
def test_what_needs_no_model_imports_no_library(args):
    """Help and the version are there at once."""
    assert not imported_by(*args) & {*HEAVY}


def test_the_version_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["goldengate", "--version"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("goldengate 0.")


@pytest.mark.skipif(torch.cuda.is_available(), reason="where a GPU is nothing is deferred")
def test_deferred_functions_are_the_compiled_ones_and_torch_is_left_as_it_was(monkeypatch):
    """The decorator runs once, at the first call, with its options; a module is compiled at once."""
    seen = []

    def decorator(function=None, **options):
        seen.append((function, options))
        return lambda *given: (function(*given), "compiled")

    def double(x):
        """Twice."""
        return 2 * x

    monkeypatch.setattr(torch, "compile", decorator)
    disable = torch.compiler.disable
    module = torch.nn.Identity()
    with compiler_deferred():
        function = torch.compile(double, dynamic=True)
        assert torch.compiler.disable is not disable
        assert seen == []
        torch.compile(module)
        other = torch.compile(fullgraph=True)(double)
    assert torch.compile is decorator
    assert torch.compiler.disable is disable
    assert seen == [(module, {})]
    assert [function(1), function(2)] == [(2, "compiled"), (4, "compiled")]
    assert seen[1:] == [(double, {"dynamic": True})]
    assert other(3) == (6, "compiled")
    assert seen[2:] == [(double, {"fullgraph": True})]
    assert (function.__name__, function.__doc__) == ("double", "Twice.")
