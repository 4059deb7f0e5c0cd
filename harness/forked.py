"""Work in a forked process: for what changes a process for good, as Megatron's process groups do."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch

from bridges.errors import GoldengateError
from harness.processes import Parent, death, keep_private


class ForkedError(GoldengateError, RuntimeError):
    """Work failed in a way that nobody foresaw, or its process died; the message says which."""


def run(work: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `work` gives in a forked process; nothing needs to be picklable but the answer.

    Raises what the work raised when a user can have caused it (GoldengateError, OSError, ValueError), else ForkedError.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    keep_private(here)
    process = context.Process(target=_answer, args=(Parent(), there, work, arguments))
    process.start()
    there.close()
    try:
        answer = here.recv()
    except EOFError:
        process.join(5)
        answer = ForkedError(f"the planning process {death(process.exitcode)}")
    except BaseException:
        process.kill()
        raise
    finally:
        process.join()
        here.close()
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _answer(parent: Parent, connection: Any, work: Callable[..., Any], arguments: tuple) -> None:
    parent.hold(connection)
    torch.set_num_threads(1)  # the parent's threads did not come along
    try:
        answer: Any = work(*arguments)
    except (GoldengateError, OSError, ValueError) as error:
        answer = error
    except Exception as error:  # Megatron's assertions among them; they need not survive the pipe as they are
        answer = ForkedError(f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}")
    connection.send(answer)
