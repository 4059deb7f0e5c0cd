"""No process outlives the one that started it, nobody waits for the dead, and what is said of a death is true (attacks 1, 6,
8, 9, 15). Parents that are killed here are forked from the test's own process."""

import multiprocessing
import os
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from bridges import Layout
from harness import forked, sweep, workers
from harness.checks.outcome import Outcome
from harness.ranks.pool import Pool, RankError, Ranks
from harness.report.cells import Cell

FORK = multiprocessing.get_context("fork")
ORDER = [Layout(), Layout(tp=2)]


def pid_of() -> int:
    return os.getpid()


def echo(value):
    return value


def sleep(seconds: float) -> str:
    time.sleep(seconds)
    return "old"


def stuck_on(rank: int) -> int:
    """One rank never comes to the collective in which the others are."""
    if torch.distributed.get_rank() == rank:
        time.sleep(600)
    value = torch.ones(())
    torch.distributed.all_reduce(value)
    return int(value)


def size(data: bytes) -> int:
    return len(data)


def alive(pid: int) -> bool:
    """A process that runs; what nobody has reaped yet is dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids, seconds: float = 2.0) -> bool:
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(alive, pids))


def with_ranks(tell) -> None:
    """A parent of two ranks, which are idle, then busy."""
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_DFL)  # whatever the test was started by ignores
    pool = Pool(2)
    tell.send(pool.run(pid_of))
    pool.run(sleep, 600)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGHUP"])
def test_attack_1_ranks_do_not_outlive_their_parent(name):
    here, there = FORK.Pipe(duplex=False)
    parent = FORK.Process(target=with_ranks, args=(there,))
    parent.start()
    assert here.poll(60)
    pids = here.recv()
    os.kill(parent.pid, getattr(signal, name))
    parent.join(10)
    assert parent.exitcode == -getattr(signal, name)
    assert gone(pids), f"ranks outlive a parent that got {name}"


def test_attack_1_ranks_of_a_passing_thread_live_on_and_still_see_the_end():
    """Linux would take the end of the thread that forked them for the end of the parent."""
    made: list[Pool] = []
    thread = threading.Thread(target=lambda: made.append(Pool(1)))
    thread.start()
    thread.join()
    time.sleep(0.2)
    assert made[0].run(echo, 7) == [7]
    made[0].close()


def test_attack_1_the_rows_of_a_killed_worker_are_run_by_another(tmp_path, caplog):
    """As the kernel kills when memory runs out: verify waited for ever. The worker has ranks, which hold its pipe open."""

    def verify(rows, cell):
        pool = Pool(1)
        for layout in ORDER:
            for row in rows:
                cell(Cell(row, str(layout), "logits", "pass", 0.0, 1.0, "", 0.1, ""))
                if row == "b" and layout == ORDER[1] and not (tmp_path / "killed").exists():
                    (tmp_path / "killed").write_text(str(pool.run(pid_of)[0]))
                    os.kill(os.getpid(), signal.SIGKILL)
        pool.close()

    told: list[Cell] = []
    found = workers.run(verify, ["a", "b", "c", "d"], ORDER, 2, told.append)
    assert [(c.layout, c.row) for c in found] == [(str(layout), row) for layout in ORDER for row in "abcd"]
    assert len(told) == len(found), "a cell is told twice"
    assert "a worker of verify was killed by signal 9 (SIGKILL)" in caplog.text
    assert "run once more: b, d" in caplog.text
    assert gone([int((tmp_path / "killed").read_text())])


def test_attack_1_a_worker_killed_twice_is_reported_with_its_signal():
    def verify(rows, cell):
        if "b" in rows:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(workers.WorkerError, match=r"signal 9 \(SIGKILL\).*the second one on the rows b, d"):
        workers.run(verify, ["a", "b", "c", "d"], ORDER, 2, lambda cell: None)


def test_attack_1_a_forked_piece_of_work_names_the_signal_that_ended_it():
    with pytest.raises(forked.ForkedError, match=r"was killed by signal 9 \(SIGKILL\)"):
        forked.run(die)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, TimeoutError, SystemExit])
def test_attack_6_no_old_answer_after_an_interrupted_job(interruption):
    """Ctrl-C, a test's timeout, SIGTERM as an exit: the next job once got the interrupted one's answer."""

    def interrupt(_number, _frame):
        raise interruption

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with Ranks() as ranks:
            pids = ranks.run(2, pid_of)
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(interruption):
                ranks.run(2, sleep, 1.0)
            assert gone(pids)
            assert ranks.run(2, echo, "new") == ["new"] * 2
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_attack_8_the_deadline_covers_sending():
    """A stopped rank takes no bytes: a large argument once blocked for ever."""
    with Ranks() as ranks:
        pids = ranks.run(2, pid_of)
        os.kill(pids[1], signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(RankError, match="rank 1 gave no answer to size in 1 s") as caught:
            ranks.run(2, size, bytes(64 << 20), deadline_s=1.0)
        assert time.monotonic() - start < 20
        assert "the process is stopped" in caught.value.stack
        assert gone(pids)


def test_attack_8_the_stuck_rank_is_blamed_not_those_who_wait_for_it():
    with Ranks() as ranks, pytest.raises(RankError, match=r"^rank 1 gave no answer to stuck_on") as caught:
        ranks.run(3, stuck_on, 1, deadline_s=2.0)
    first = caught.value.stack.split("--- rank ")[1]
    assert "in stuck_on" in first
    assert "all_reduce" not in first


def test_attack_8_a_death_names_its_signal_and_job():
    with Ranks() as ranks:
        pids = ranks.run(2, pid_of)
        os.kill(pids[0], signal.SIGUSR2)
        with pytest.raises(RankError, match=r"^rank 0 was killed by signal 12 \(SIGUSR2\) in echo"):
            ranks.run(2, echo, 1)


def test_attack_9_a_death_is_one_check_s_and_no_false_cause_is_given_to_the_next(monkeypatch):
    """The checks after it once failed with `build first`: the ranks are built anew and asked."""

    def lives(bench):
        return Outcome(bench.run(has_model) == [True], 0.0, 0.0, "", "")

    monkeypatch.setattr(sweep, "FUNCTIONS", {**sweep.FUNCTIONS, "complete": die_here, "roundtrip": lives})
    report = sweep.verify_rows(["llama2"], which=["tp1"], checks=["complete", "roundtrip"])
    assert [c.status for c in report.cells] == ["error", "pass"], [c.detail for c in report.cells]
    assert "was killed by signal 9 (SIGKILL)" in report.cells[0].detail
    assert "in die" in report.cells[0].detail


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_here(bench):
    bench.run(die)


def has_model() -> bool:
    from harness.ranks import jobs

    return bool(jobs.current().chunks)


def test_attack_15_a_pool_that_cannot_be_made_leaves_nothing(tmp_path, monkeypatch):
    """With too few file descriptors, construction fails midway: ranks and a folder stayed, a try at a time."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made: list = []
    start = Pool._start
    monkeypatch.setattr(Pool, "_start", lambda self: (made.append(self), start(self)))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(n) for n in os.listdir("/proc/self/fd")}
    free = [n for n in range(max(used) + 20) if n not in used]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[12], hard))
    try:
        with pytest.raises(RankError, match=r"^8 ranks cannot be started: Too many open files$"):
            Pool(8)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert made[0].processes, "not one rank was started: nothing is shown"
    assert gone([process.pid for process in made[0].processes])
    assert not list(tmp_path.iterdir())
