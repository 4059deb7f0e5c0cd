"""One short file per family. Every module here is imported when this is, so that its registration runs."""

import importlib
import pkgutil

from bridges.model_bridge import MegatronModelBridge

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["MegatronModelBridge"]
