"""A pool of ranks: forked from this process, which has torch and Megatron already imported, or new ones with a GPU.

Ranks stay alive between jobs, run with one thread each and hold a gloo (or NCCL) world of their size. A job is a
module-level function called on every rank with the same arguments. A rank that fails, dies or passes the deadline fails the
job, with its stack, and the pool is built anew for the next one.
"""

from __future__ import annotations

import atexit
import faulthandler
import logging
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from bridges.errors import GoldengateError

GRACE_S = 3.0  # how long the other ranks may take once one has failed


class RankError(GoldengateError, RuntimeError):
    """A job failed on a rank: the message is one line, `stack` the whole story."""

    def __init__(self, message: str, stack: str = ""):
        super().__init__(message)
        self.stack = stack


class Pool:
    """`world_size` forked ranks. `run` is the only thing to do with it; `close` ends it."""

    def __init__(self, world_size: int):
        self.world_size = world_size
        self.folder = Path(tempfile.mkdtemp(prefix="goldengate-ranks-"))
        # With a GPU ranks are new processes: a fork cannot use CUDA once its parent has, and importing fla does.
        context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, there, self.folder), daemon=True)
            process.start()
            there.close()
            self.connections.append(here)
            self.processes.append(process)

    def run(self, function: Callable, *args: Any, deadline_s: float = 120.0) -> list[Any]:
        """`function(*args)` on every rank; the results by rank. Raises RankError, after which the pool is closed."""
        results: list[Any] = [None] * self.world_size
        try:
            for connection in self.connections:
                connection.send((function, args))
        except OSError as error:
            self.close()
            raise RankError(f"a rank of {self.world_size} is gone before {function.__name__}: {error}") from None
        waiting = dict(zip(self.connections, range(self.world_size), strict=True))
        failures: dict[int, tuple[str, str]] = {}
        end = time.monotonic() + deadline_s
        while waiting and (left := end - time.monotonic()) > 0:
            for connection in wait(list(waiting), timeout=left):
                rank = waiting.pop(connection)  # type: ignore[call-overload]
                try:
                    ok, value = connection.recv()  # type: ignore[union-attr]
                except (EOFError, OSError):
                    self.processes[rank].join(1)  # its pipe closes a moment before it has an exit code
                    ok, value = False, (f"rank {rank} died", f"exit code {self.processes[rank].exitcode}")
                if ok:
                    results[rank] = value
                else:
                    failures[rank] = value
                    end = min(end, time.monotonic() + GRACE_S)
        if not failures and not waiting:
            return results
        for rank in waiting.values():
            failures.setdefault(
                rank, (f"rank {rank} gave no answer to {function.__name__} in {deadline_s:g} s", self._stack(rank))
            )
        self.close()
        raise _joined(failures, self.world_size)

    def _stack(self, rank: int) -> str:
        """Where a silent rank stands: it writes its Python stack when asked by signal."""
        pid = self.processes[rank].pid
        if pid is None or not self.processes[rank].is_alive():
            return "the process is gone"
        os.kill(pid, signal.SIGUSR1)
        time.sleep(0.2)
        return (self.folder / f"stack{rank}").read_text()

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()
        shutil.rmtree(self.folder, ignore_errors=True)


def _joined(failures: dict[int, tuple[str, str]], world_size: int) -> RankError:
    """The failure that came of itself first: ranks that only lost their peer say less."""

    def secondary(item):
        message = item[1][0]
        return any(word in message for word in ("Connection closed", "gave no answer", "Connection reset", "timed out"))

    ordered = sorted(failures.items(), key=lambda item: (secondary(item), item[0]))
    rank, (message, _) = ordered[0]
    notes = [f"on rank {rank}"] if world_size > 1 and not message.startswith(f"rank {rank} ") else []
    notes += [f"{len(ordered)} ranks failed"] if len(ordered) > 1 else []
    message += f" ({'; '.join(notes)})" if notes else ""
    return RankError(message, "\n".join(f"--- rank {rank}\n{stack}" for rank, (_, stack) in ordered))


def _serve(rank: int, world_size: int, connection: Connection, folder: Path) -> None:
    """A rank's life: make the world, then answer jobs until the other end closes."""
    stack = open(folder / f"stack{rank}", "w")  # noqa: SIM115 - lives as long as the process
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A rank dies with its parent, as daemons do, and may all the same fork: Megatron's checkpoint writers are children.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        _first_configurations()
        from harness import plugins
        from harness.quiet import quiet

        quiet()
        plugins.load_from_environment()
    ready = False
    while True:
        try:
            function, args = connection.recv()
        except (EOFError, OSError):
            os._exit(0)  # no atexit: they belong to the parent
        try:
            if not ready:
                _join_world(rank, world_size, folder)
                ready = True
            answer = (True, function(*args))
        except BaseException as error:
            line = str(error).strip().splitlines()
            kind = type(error).__name__
            answer = (False, (f"{kind}: {line[0]}" if line else kind, traceback.format_exc()))
        try:
            connection.send(answer)
        except Exception as error:  # an answer that does not pickle
            connection.send((False, (f"{type(error).__name__}: {error}", traceback.format_exc())))


def _first_configurations() -> None:
    """Triton kernels take the first of their configurations. To find the fastest, flash-linear-attention compiles a hundred,
    which takes minutes; parity does not ask for it."""
    from triton.runtime.autotuner import Autotuner

    make = Autotuner.__init__

    def first(self, fn, arg_names, configs, *args, **kwargs):
        make(self, fn, arg_names, configs[:1], *args, **kwargs)

    Autotuner.__init__ = first  # before anybody imports a kernel


def _one_event_loop() -> None:
    """All gloo groups of a rank share one device. Each would have its own, with a thread that wakes a hundred times a second,
    and Megatron makes dozens of groups a rank: a third of the processor went there. A torch whose gloo cannot share a device
    is told by its version, and goes on with a device for each group."""
    plain: Any = torch.distributed.ProcessGroupGloo
    try:
        device = plain.create_device(interface="lo")
        options = plain._Options()
        _ = options._devices, options._threads, options._timeout
    except (AttributeError, TypeError, RuntimeError) as error:
        logging.getLogger(__name__).warning(
            "torch %s: gloo groups cannot share a device (%s); ranks work, but slower", torch.__version__, error
        )
        return

    class Sharing(plain):
        def __init__(self, store, rank, size, timeout=None, **more):
            if timeout is None or any(more.values()):  # something that is not known here is asked for: torch's own way
                super().__init__(store, rank, size, *([] if timeout is None else [timeout]), **more)
                return
            options = plain._Options()
            options._devices, options._threads, options._timeout = [device], 1, timeout
            super().__init__(store, rank, size, options)

    torch.distributed.distributed_c10d.ProcessGroupGloo = Sharing  # type: ignore[misc]


def _join_world(rank: int, world_size: int, folder: Path) -> None:
    gpu = torch.cuda.is_available()
    store = torch.distributed.FileStore(str(folder / "store"), world_size)
    if gpu:
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # read when CUDA starts: without it Transformer Engine's fp32 is TF32
        torch.cuda.set_device(rank)
    else:
        _one_event_loop()
    torch.distributed.init_process_group("nccl" if gpu else "gloo", store=store, rank=rank, world_size=world_size)


class Ranks:
    """Runs jobs on a pool of the asked size, built when first needed and rebuilt after a failure.

    One pool lives at a time in a process: every gloo group keeps threads that wake a hundred times a second, and the
    hundreds of groups of idle pools would take the cores from the working one. Forking a pool costs 0.1 s.
    """

    _active: Ranks | None = None

    def __init__(self) -> None:
        self._pool: Pool | None = None
        self._purpose: object = None
        atexit.register(self.close)

    def run(self, world_size: int, function: Callable, *args: Any, deadline_s: float = 120.0) -> list[Any]:
        if Ranks._active is not self and Ranks._active is not None:
            Ranks._active.close()
        Ranks._active = self
        if self._pool is None or self._pool.world_size != world_size:
            self.close()
            self._pool = Pool(world_size)
        try:
            return self._pool.run(function, *args, deadline_s=deadline_s)
        except RankError:
            self._pool = None  # it has closed itself
            raise

    def use_for(self, purpose: object) -> None:
        """Start with a new pool when the purpose (a layout) is another one: gloo's groups are never taken down."""
        if purpose != self._purpose and not torch.cuda.is_available():
            self.close()
            self._purpose = purpose

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_) -> None:
        self.close()
