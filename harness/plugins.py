"""Plugins: modules or files outside our repository that register bridges."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from bridges import MegatronModelBridge
from bridges.errors import GoldengateError

VARIABLE = "GOLDENGATE_PLUGINS"  # ranks on GPUs are new processes, which load what this says
_loaded: dict[str, ModuleType] = {}


class PluginError(GoldengateError, ValueError):
    """A plugin that cannot be imported or registers no bridge: the message says why."""


def load(plugin: str) -> ModuleType:
    """Import a plugin, a module's name or the path of a Python file, and return it; one that is loaded already stays.

    Raises PluginError when it is not there, fails on import, or registers no bridge.
    """
    is_file = plugin.endswith(".py") or os.sep in plugin
    key = str(Path(plugin).resolve()) if is_file else plugin
    if key in _loaded:
        return _loaded[key]
    before = _registrations()
    module = _import_file(Path(key)) if is_file else _import_module(key)
    after = _registrations()
    if after == before and not any(name.split(".")[0] == module.__name__.split(".")[0] for name, _ in after.values()):
        raise PluginError(
            f"plugin {plugin} registers no bridge: decorate its class with @MegatronModelBridge.register_bridge(source=...)"
        )
    _loaded[key] = module
    os.environ[VARIABLE] = os.pathsep.join(_loaded)
    return module


def load_from_environment() -> None:
    """Load what the process that started this one had loaded."""
    for plugin in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        load(plugin)


def _registrations() -> dict[str, tuple[str, int]]:
    """{architecture: (the bridge's module, which class it is)}."""
    found = {name: MegatronModelBridge.registered([name]) for name in MegatronModelBridge.supported()}
    return {name: (one.bridge.__module__, id(one.bridge)) for name, one in found.items() if one}


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise PluginError(f"plugin {path} is not there: give a Python file, or the name of a module")
    name = f"goldengate_plugin_{path.stem.replace('-', '_')}_{hashlib.sha1(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        raise _failed(str(path), error) from error
    return module


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise _failed(name, error) from error


def _failed(plugin: str, error: BaseException) -> BaseException:
    if not isinstance(error, Exception):
        return error  # an interrupt
    return PluginError(f"plugin {plugin} does not import: {type(error).__name__}: {' '.join(str(error).split())}")
