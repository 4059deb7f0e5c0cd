"""A repository that is not ours and has bridges of its own: what its pyproject.toml says under [tool.goldengate].

[tool.goldengate]
plugins = ["our_bridges.arcee", "more/bridges.py"]  # modules or files that register bridges
rows = ["rows"]        # folders of toy rows
goldens = ["goldens"]  # folders of their goldens
"""

from __future__ import annotations

import sys
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bridges.errors import GoldengateError


class ProjectError(GoldengateError, ValueError):
    """A [tool.goldengate] that cannot be used: the message names the file and all wrong words."""


@dataclass(frozen=True)
class Project:
    """The table of the pyproject.toml in `folder`; files and folders are relative to it."""

    folder: Path
    plugins: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    goldens: tuple[str, ...] = ()

    def activate(self) -> None:
        """Register the bridges, and count the rows and goldens beside ours. Once is enough; again changes nothing.

        Raises PluginError, and ValueError for folders that are not there and rows whose names are taken.
        """
        import toy_models
        from harness import plugins
        from harness.reference import goldens

        if str(self.folder) not in sys.path:
            sys.path.insert(0, str(self.folder))
        for plugin in self.plugins:
            plugins.load(str(self.folder / plugin) if plugin.endswith(".py") else plugin)
        for name in self.rows:
            toy_models.add_rows(self.folder / name)
        for name in self.goldens:
            goldens.add_folder(self.folder / name)


def find(start: Path | None = None) -> Project | None:
    """Return the project of the first pyproject.toml with a [tool.goldengate], from a folder (the current one) upwards.

    Raises ProjectError for a file that is no TOML and for words that the table does not know.
    """
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        file = folder / "pyproject.toml"
        if file.is_file() and (table := _table(file)) is not None:
            return _project(file, table)
    return None


def _table(file: Path) -> dict[str, Any] | None:
    try:
        return tomllib.loads(file.read_text("utf-8")).get("tool", {}).get("goldengate")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ProjectError(f"{file} is not TOML: {error}") from None


def _project(file: Path, table: Any) -> Project:
    known = [one.name for one in fields(Project) if one.name != "folder"]
    wrong = sorted(set(table) - set(known)) if isinstance(table, dict) else ["the table itself"]
    if wrong:
        raise ProjectError(f"{file}: [tool.goldengate] has {', '.join(known)}; not known: {', '.join(wrong)}")
    lists = [n for n, v in table.items() if not isinstance(v, list) or not all(isinstance(one, str) for one in v)]
    if lists:
        raise ProjectError(f"{file}: [tool.goldengate] {', '.join(lists)}: a list of strings is needed")
    return Project(file.parent, **{name: tuple(value) for name, value in table.items()})
