"""A repository that is not ours: its plugins, rows and goldens, on the command line and in pytest."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import toy_models
from bridges.model_bridge import _REGISTERED
from harness import cli, plugins, project
from harness.reference import goldens
from toy_models import catalogue

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "own-bridge"
BRIDGE = """
from bridges import MegatronModelBridge

@MegatronModelBridge.register_bridge(source="OursForCausalLM")
class OursBridge(MegatronModelBridge):
    pass
"""
RUN = """
import sys, pytest
code = pytest.main(["-p", "harness.pytest_plugin", "-p", "no:cacheprovider", "-v", "--layouts", "tp1,tp2-sp"])
sys.argv = ["goldengate", "verify", "--layouts", "pp2", "--checks", "logits", "--json", "report.json"]
from harness.cli import main
main() if code == 0 else sys.exit(int(code))
"""


@pytest.fixture
def nothing_stays(monkeypatch):
    """What a plugin or a project adds to this process is taken away again."""
    for home, name in ((plugins, "_loaded"), (catalogue, "_further"), (goldens, "_further")):
        monkeypatch.setattr(home, name, type(getattr(home, name))())
    monkeypatch.setenv(plugins.VARIABLE, "")
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = dict(_REGISTERED)
    yield
    _REGISTERED.clear()
    _REGISTERED.update(before)


def test_the_example_repository_runs_its_own_cells(tmp_path):
    """Copied out of ours and run by the real interpreter: pytest passes every cell of its row and of no other, and so does
    `goldengate verify` without arguments."""
    repository = shutil.copytree(EXAMPLE, tmp_path / "repository")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "COV"))}
    found = subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=repository,
        env={**environment, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    for cell in ("tp1-config", "tp1-logits", "tp2-sp-roundtrip", "tp2-sp-grads"):
        assert f"test_cell[our_arcee-{cell}] PASSED" in found.stdout
    assert "llama3" not in found.stdout
    assert '"row": "our_arcee"' in (repository / "report.json").read_text()


def test_a_project_is_found_upwards_and_activated_once(nothing_stays, monkeypatch):
    """From a folder below it; bridges, rows and goldens count from then on, and again changes nothing."""
    found = project.find(EXAMPLE / "tests")
    assert found == project.Project(EXAMPLE, ("our_bridges.arcee",), ("rows",), ("goldens",))
    for _ in range(2):
        found.activate()
    assert toy_models.further_rows() == ["our_arcee"]
    assert "our_arcee" in toy_models.rows()
    assert goldens.path("our_arcee") == EXAMPLE / "goldens" / "our_arcee.safetensors"
    assert goldens.load("our_arcee").provenance["row"] == "our_arcee"
    assert "our_arcee" not in goldens.orphans()
    assert "ArceeForCausalLM" in _REGISTERED


def test_our_own_repository_is_no_project_of_that_kind():
    """Nothing of a user's is found where our own tests run."""
    assert project.find(ROOT) is None


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('plugin = ["a"]\nrow = ["b"]', r"has plugins, rows, goldens; not known: plugin, row"),
        ('rows = "rows"', r"rows: a list of strings is needed"),
        ("rows = [", r"is not TOML"),
    ],
)
def test_a_table_that_says_something_else(tmp_path, table, message):
    """All wrong words at once."""
    (tmp_path / "pyproject.toml").write_text(f"[tool.goldengate]\n{table}\n")
    with pytest.raises(project.ProjectError, match=message):
        project.find(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not there"),
        ("import no_such_module", "does not import: ModuleNotFoundError: No module named 'no_such_module'"),
        ("x = (", "does not import: SyntaxError"),
        ("x = 1", "registers no bridge"),
    ],
)
def test_a_plugin_that_is_none(tmp_path, text, message, nothing_stays):
    """Not there, broken, or without a bridge: one line."""
    file = tmp_path / "plugin.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(plugins.PluginError, match=message) as caught:
        plugins.load(str(file))
    assert "\n" not in str(caught.value)
    assert plugins.load_from_environment() is None


def test_a_plugin_of_the_command_line_is_loaded_before_rows_are_looked_at(tmp_path, nothing_stays):
    """`verify --plugin FILE` registers its bridge; new processes are told by the environment."""
    file = tmp_path / "ours.py"
    file.write_text(BRIDGE)
    command = typer.main.get_command(cli.app)
    with pytest.raises(ValueError, match="no toy row 'nobody'"):
        command.main(["verify", "nobody", "--plugin", str(file)], standalone_mode=False)
    assert _REGISTERED["OursForCausalLM"].bridge.__name__ == "OursBridge"
    assert os.environ[plugins.VARIABLE] == str(file)
    assert plugins.load(str(file)) is plugins.load(str(file))
    with pytest.raises(ValueError, match="no_such_plugin does not import"):
        command.main(["verify", "llama3", "--plugin", "no_such_plugin"], standalone_mode=False)


def test_rows_of_somebody_else_do_not_hide_ours(tmp_path, nothing_stays):
    """A name that is taken, a folder without rows, no folder for goldens."""
    with pytest.raises(ValueError, match="holds no row"):
        toy_models.add_rows(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        toy_models.add_rows(tmp_path / "rows")
    shutil.copy(catalogue.ROWS / "llama3.json", tmp_path)
    with pytest.raises(ValueError, match="a row named llama3 already"):
        toy_models.add_rows(tmp_path)
    (tmp_path / "llama3.json").rename(tmp_path / "their_llama.json")
    toy_models.add_rows(tmp_path)
    assert toy_models.config_dict("their_llama") == toy_models.config_dict("llama3")
    with pytest.raises(ValueError, match="no folder for the golden of row their_llama"):
        goldens.path("their_llama")
