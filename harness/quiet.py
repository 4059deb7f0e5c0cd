"""The libraries say nothing while goldengate works: what they print on import and construction is no news here."""

from __future__ import annotations

import logging
import os
import warnings


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
