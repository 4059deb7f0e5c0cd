"""What may be set on a provider: fields that exist, until finalize(); Megatron itself sets what it sets."""

from __future__ import annotations

import sys
from dataclasses import fields
from types import FrameType
from typing import Any

from bridges.errors import GoldengateError, near_miss, nearest_names

# What a training loop hangs on Megatron's configuration when the model is there.
OF_TRAINING = frozenset(
    {
        "finalize_model_grads_func",
        "grad_scale_func",
        "grad_sync_func",
        "mtp_loss_scaling_factor",
        "no_sync_func",
        "param_sync_func",
        "timers",
    }
)


class ProviderError(GoldengateError, AttributeError, ValueError):
    """A provider's field that does not exist, is locked, or cannot be honoured: the message names it."""


def locked(what: str) -> ProviderError:
    return ProviderError(
        f"{what} cannot be set after provider.finalize(), which has derived and validated the rest from it: set it before, "
        "or take another provider from the bridge"
    )


def check(provider: Any, name: str) -> None:
    """Raise ProviderError for a name that is no field of the provider, or for any that is set after finalize().

    A class may give its own objects more attributes, and change them, in its own methods.
    """
    if name.startswith("_") or _is_at_home(sys._getframe(2), provider):
        return
    kind = type(provider)
    if not hasattr(kind, name) and name not in vars(provider):
        known = [field.name for field in fields(kind)]
        near = near_miss(name, known) or next(iter(nearest_names(name, known)), None)
        raise ProviderError(f"{kind.__name__} has no field {name}" + (f"; did you mean {near}?" if near else ""))
    if vars(provider).get("_final") and name not in OF_TRAINING:
        raise locked(f"provider.{name}")


def _is_at_home(frame: FrameType, provider: Any) -> bool:
    """Does the code in `frame` belong to Megatron, to the bridges or to the provider's own class?"""
    while frame.f_code.co_name == "__setattr__" and frame.f_back is not None:  # a subclass's, which calls super's
        frame = frame.f_back
    home = frame.f_globals.get("__name__", "").partition(".")[0]
    return home in ("megatron", "bridges") or frame.f_locals.get("self") is provider
