"""A pool of ranks: forked from this process, which has torch and Megatron already imported, or new ones with a GPU.

Ranks stay alive between jobs, run with one thread each and hold a gloo (or NCCL) world of their size. A job is a
module-level function called on every rank with the same arguments. A rank that fails, dies or passes the deadline fails the
job, with its stack, and the pool is built anew for the next one.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bridges.errors import GoldengateError
from harness.processes import Parent, death, keep_private
from harness.ranks.wire import receive, send

GRACE_S = 3.0  # how long the other ranks may take once one has failed
LOOK_S = 1.0  # between two looks whether silent ranks live
STACK_S = 5.0  # for a rank to write where it stands
JOIN_S, JOIN_S_PER_RANK = 120.0, 4.0  # for ranks to find each other, on a busy machine
STOPPED = "the process is stopped (by SIGSTOP or a debugger)"
COLLECTIVES = os.path.join("torch", "distributed", "")

_place: tuple[int, int, Path] | None = None  # in a rank: its number, the world's size, the pool's folder


class RankError(GoldengateError, RuntimeError):
    """A job failed on a rank: the message is one line, `stack` the whole story."""

    def __init__(self, message: str, stack: str = ""):
        super().__init__(message)
        self.stack = stack


class Pool:
    """`world_size` forked ranks in a world of their own. `run` is the only thing to do with it; `close` ends it.

    Raises RankError when the ranks cannot be started or do not find each other; nothing is then left of them.
    """

    def __init__(self, world_size: int):
        self.world_size, self.closed = world_size, False
        self.connections: list[Connection] = []
        self.processes: list[Any] = []
        self.folder = Path(tempfile.mkdtemp(prefix="goldengate-ranks-"))
        try:
            self._start()
            self.run(_join_world, deadline_s=JOIN_S + JOIN_S_PER_RANK * world_size)
        except OSError as error:
            self.close()
            raise RankError(f"{world_size} ranks cannot be started: {error.strerror or error}") from error
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        # With a GPU ranks are new processes: a fork cannot use CUDA once its parent has, and importing fla does.
        context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
        for rank in range(self.world_size):
            here, there = context.Pipe()
            with there:
                keep_private(here)
                self.connections.append(here)
                arguments = (rank, self.world_size, there, self.folder, Parent())
                process = context.Process(target=_serve, args=arguments, daemon=True)
                process.start()
                self.processes.append(process)

    def run(self, function: Callable, *args: Any, deadline_s: float = 120.0) -> list[Any]:
        """`function(*args)` on every rank; the results by rank. The deadline is for all of it, sending included.

        Raises RankError. After that, or anything else that interrupts a job, the pool is closed: an answer still under way
        would be taken for the next job's.
        """
        # What does not pickle is found before any rank has half a job. Each rank has a pickle of its own: torch passes a
        # tensor as a file that can be fetched once.
        payloads = [bytes(ForkingPickler.dumps((function, args))) for _ in self.connections]
        try:
            results, failures = self._answers(payloads, function.__name__, deadline_s)
            if failures:
                raise _joined(failures, self.world_size)
            return results
        except BaseException:
            self.close()
            raise

    def _answers(self, payloads: list[bytes], job: str, deadline_s: float) -> tuple[list[Any], dict[int, Failure]]:
        end = time.monotonic() + deadline_s
        results: list[Any] = [None] * self.world_size
        failures: dict[int, Failure] = {}
        late: list[int] = []
        waiting: dict[Any, int] = {}
        for rank, connection in enumerate(self.connections):
            try:
                send(connection, payloads[rank], end)
                waiting[connection] = rank
            except TimeoutError:
                late.append(rank)
            except OSError:
                failures[rank] = self._death(rank, job)
        if failures or late:  # the others have a moment to say more
            end = time.monotonic() + GRACE_S
        while waiting and (left := end - time.monotonic()) > 0:
            # A dead rank's pipe may be held open by a child of its own: look at the process now and then.
            ready = wait(list(waiting), timeout=min(left, LOOK_S))
            for connection in ready or [c for c, rank in waiting.items() if not self.processes[rank].is_alive()]:
                rank = waiting.pop(connection)
                try:
                    ok, value = pickle.loads(receive(connection, end))  # type: ignore[arg-type]
                except TimeoutError:
                    late.append(rank)
                    continue
                except (EOFError, OSError):
                    ok, value = False, self._death(rank, job)
                if ok:
                    results[rank] = value
                else:
                    failures[rank] = value
                    end = min(end, time.monotonic() + GRACE_S)
        late = sorted({*late, *waiting.values()})
        for rank, stack in self._stacks(late).items():
            failures.setdefault(rank, Failure(f"rank {rank} gave no answer to {job} in {deadline_s:g} s", stack))
        return results, failures

    def _death(self, rank: int, job: str) -> Failure:
        self.processes[rank].join(1)  # its pipe closes a moment before it has an exit code
        return Failure(f"rank {rank} {death(self.processes[rank].exitcode)} in {job}", "the process is gone")

    def _stacks(self, ranks: list[int]) -> dict[int, str]:
        """Where silent ranks stand: each writes its Python stack when asked by signal, unless it is stopped itself."""
        found = {rank: "the process is gone" for rank in ranks}
        asked = [rank for rank in ranks if self.processes[rank].is_alive()]
        for rank in asked:
            os.kill(self.processes[rank].pid, signal.SIGUSR1)
        end = time.monotonic() + STACK_S
        while asked and time.monotonic() < end:
            time.sleep(0.05)
            for rank in list(asked):
                if _is_stopped(self.processes[rank].pid):
                    found[rank] = STOPPED
                    asked.remove(rank)
                elif (stack := (self.folder / f"stack{rank}").read_text()).endswith("\n"):
                    time.sleep(0.05)  # the rest of a long one
                    found[rank] = (self.folder / f"stack{rank}").read_text() or stack
                    asked.remove(rank)
        found.update(dict.fromkeys(asked, "it does not say where it stands"))
        return found

    def close(self) -> None:
        """End all ranks, busy or stopped, and remove their folder."""
        self.closed = True
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()
        for connection in self.connections:
            connection.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class Failure(NamedTuple):
    """What went wrong on a rank, in one line, and the stack."""

    message: str
    stack: str

    @property
    def secondary(self) -> bool:
        """Does this rank only wait for another one, or has it only lost one?"""
        if any(words in self.message for words in ("Connection closed", "Connection reset", "timed out")):
            return True
        _, _, current = self.stack.rpartition("Current thread")
        newest = [line for line in current.splitlines() if line.lstrip().startswith("File ")][:4]
        return "gave no answer" in self.message and any(COLLECTIVES in line for line in newest)


def _is_stopped(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "tT"
    return False


def _joined(failures: dict[int, Failure], world_size: int) -> RankError:
    """The failure that came of itself first: ranks that only wait for a peer, or lost it, say less."""

    def order(item: tuple[int, Failure]):
        _, (message, stack) = item
        return item[1].secondary, "gave no answer" in message, STOPPED not in stack, item[0]

    ordered = sorted(failures.items(), key=order)
    rank, (message, _) = ordered[0]
    notes = [f"on rank {rank}"] if world_size > 1 and not message.startswith(f"rank {rank} ") else []
    notes += [f"{len(ordered)} ranks failed"] if len(ordered) > 1 else []
    message += f" ({'; '.join(notes)})" if notes else ""
    return RankError(message, "\n".join(f"--- rank {rank}\n{stack}" for rank, (_, stack) in ordered))


def _serve(rank: int, world_size: int, connection: Connection, folder: Path, parent: Parent) -> None:
    """A rank's life: answer jobs, of which the first makes the world, until the other end closes."""
    global _place
    parent.hold(connection)
    _place = (rank, world_size, folder)
    stack = open(folder / f"stack{rank}", "w")  # noqa: SIM115 - lives as long as the process
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A rank dies with its parent, as daemons do, and may all the same fork: Megatron's checkpoint writers are children.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        # Triton multiplies fp32 in TF32 unless it is told not to: fla's kernels would differ by 1e-3 from a right model.
        os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
        _first_configurations()
        from harness import plugins
        from harness.quiet import quiet

        quiet()
        plugins.load_from_environment()
    while True:
        try:
            message = receive(connection)
        except (EOFError, OSError):
            os._exit(0)  # no atexit: they belong to the parent
        try:
            function, args = pickle.loads(message)
            answer = (True, function(*args))
        except BaseException as error:
            answer = (False, _failure(error))
        try:
            payload = bytes(ForkingPickler.dumps(answer))
        except Exception as error:  # an answer that does not pickle
            payload = bytes(
                ForkingPickler.dumps((False, Failure(f"{type(error).__name__}: {error}", traceback.format_exc())))
            )
        try:
            send(connection, payload)
        except OSError:
            os._exit(0)


def _failure(error: BaseException) -> Failure:
    line, kind = str(error).strip().splitlines(), type(error).__name__
    return Failure(f"{kind}: {line[0]}" if line else kind, traceback.format_exc())


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


def _join_world() -> None:
    """Every rank's first job."""
    assert _place is not None
    rank, world_size, folder = _place
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
        pool = self._pool
        try:
            return pool.run(function, *args, deadline_s=deadline_s)
        finally:
            if pool.closed:  # whatever interrupted the job
                self._pool = None

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
