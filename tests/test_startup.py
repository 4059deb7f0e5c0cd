"""What a command imports before it says its first word."""

import json
import os
import subprocess
import sys

import pytest

from harness.cli import main

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
