"""Child processes that never outlive their parent, pipes that no sibling keeps open, and what a death is called."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import weakref
from multiprocessing.connection import Connection
from types import FrameType

PR_SET_PDEATHSIG = 1  # sys/prctl.h
_libc = ctypes.CDLL(None, use_errno=True)  # before any fork: a child should load nothing first
_private: weakref.WeakSet[Connection] = weakref.WeakSet()  # ends of pipes that are this process's alone


class Parent:
    """The process and thread that start a child. Make one before the fork and call `hold` first thing in the child."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        # Linux means the *thread* that forked when it says parent: a child of a passing thread would die with it. Those
        # children see their pipe close instead.
        self.lasting = threading.current_thread() is threading.main_thread()

    def hold(self, *mine: Connection) -> None:
        """In the child: die when the parent dies, however it does; close all inherited pipe ends but `mine`, so that EOF
        means what it says; take signals as any process does."""
        if self.lasting:
            _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self.pid:  # it died before we could ask
            os._exit(1)
        for name in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(name, signal.SIG_DFL)
        for connection in list(_private):
            if connection not in mine and not connection.closed:
                connection.close()
        _private.clear()
        keep_private(*mine)


def keep_private(*connections: Connection) -> None:
    """Have these pipe ends closed in every child that is forked from now on."""
    _private.update(connections)


def exit_on_signals() -> None:
    """Make SIGTERM and SIGHUP an exit like any other, with `finally` and `atexit`; by default they end Python on the spot."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for name in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(name) is signal.SIG_DFL:  # nohup ignores SIGHUP, and means it
            signal.signal(name, leave)


def death(exitcode: int | None) -> str:
    """Say how a process ended: `was killed by signal 9 (SIGKILL)` or `left with exit code 3`."""
    if exitcode is None:
        return "closed its pipe and lives on"
    if exitcode >= 0:
        return f"left with exit code {exitcode}"
    try:
        name = f" ({signal.Signals(-exitcode).name})"
    except ValueError:
        name = ""
    hint = ", as the kernel does when memory runs out" if exitcode == -signal.SIGKILL else ""
    return f"was killed by signal {-exitcode}{name}{hint}"
