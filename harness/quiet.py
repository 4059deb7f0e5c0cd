"""The libraries say nothing while goldengate works: what they print on import and construction is no news here."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable


def noise() -> Callable[[], None]:
    """Remember how loud this process is; the function that is returned makes it so again."""
    from transformers.utils import logging as hf_logging

    filters, names = list(warnings.filters), ("HF_HUB_OFFLINE", "TRANSFORMERS_VERBOSITY")
    environment = {name: os.environ.get(name) for name in names}
    levels = {name: logging.getLogger(name).level for name in ("megatron", "transformers", "torch")}
    bars = hf_logging.is_progress_bar_enabled()

    def restore() -> None:
        warnings.filters[:] = filters  # type: ignore[index]
        for name, value in environment.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        hf_logging.enable_progress_bar() if bars else hf_logging.disable_progress_bar()

    return restore


def quiet() -> None:
    """Megatron and transformers say much on import and construction that is no news here."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for name in ("megatron", "transformers", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
