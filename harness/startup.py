"""A command starts without torch's compiler.

Megatron-Core decorates some fifty functions with torch.compile, and transformers a few with decorators of torch.compiler
and torch._dynamo. The first of them imports inductor, for functions that are not called on a laptop. (torch._dynamo itself
still comes: transformers.masking_utils imports it by name.)
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any


@contextmanager
def compiler_deferred() -> Iterator[None]:
    """Functions that are decorated inside, by modules being imported, meet torch's compiler when they are first called.

    torch is as it was afterwards. Where a GPU is, nothing is deferred: there the
    functions are called, and measured.
    """
    import torch

    if torch.cuda.is_available():
        yield
        return
    places = [(torch, "compile"), *((torch.compiler, name) for name in _Dynamo.DEFERRED)]
    originals = [getattr(module, name) for module, name in places]
    stand_in = None if "torch._dynamo" in sys.modules else _Dynamo("torch._dynamo")
    try:
        for (module, name), original in zip(places, originals, strict=True):
            setattr(module, name, _when_called(original))
        if stand_in:
            vars(torch)["_dynamo"] = stand_in
        yield
    finally:
        for (module, name), original in zip(places, originals, strict=True):
            setattr(module, name, original)
        if vars(torch).get("_dynamo") is stand_in:  # not so once somebody has imported the module itself
            vars(torch).pop("_dynamo", None)


class _Dynamo(ModuleType):
    """Stands for torch._dynamo, which torch imports when it is first looked up: the decorators of DEFERRED are deferred,
    and whoever asks for anything else gets the module's own."""

    DEFERRED = ("allow_in_graph", "assume_constant_result", "disable")

    def __getattr__(self, name: str) -> Any:
        def own(*given: Any, **options: Any) -> Any:
            return getattr(importlib.import_module("torch._dynamo"), name)(*given, **options)

        return _when_called(own) if name in self.DEFERRED else getattr(importlib.import_module("torch._dynamo"), name)


def _when_called(decorator: Callable[..., Any]) -> Callable[..., Any]:
    """Return a decorator that gives what `decorator` does, made when it is first called.

    Options alone give such a decorator; what is no plain function (a module) goes to `decorator` at once.
    """

    @functools.wraps(decorator)
    def deferred(*given: Any, **options: Any) -> Any:
        if not given and options:
            return functools.partial(deferred, **options)
        if len(given) != 1 or not isinstance(given[0], FunctionType):
            return decorator(*given, **options)
        function = given[0]
        decorated = functools.cache(lambda: decorator(function, **options))

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            return decorated()(*arguments, **named)

        return call

    return deferred
