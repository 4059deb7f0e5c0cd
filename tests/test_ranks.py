"""The pool of forked ranks: results by rank; what goes wrong on one is reported with rank and stack."""

import os
import re
import signal
import time
from datetime import timedelta

import pytest
import torch

from bridges.auto_bridge import _together
from harness.ranks import pool as pool_module
from harness.ranks.pool import Pool, RankError, Ranks


def hello(word: str) -> tuple[str, int, int, int]:
    """What a rank knows about itself: the argument, its rank, its threads, its process."""
    return word, torch.distributed.get_rank(), torch.get_num_threads(), os.getpid()


def total(value: int) -> int:
    """A real collective: the sum of value x rank over all ranks."""
    tensor = torch.tensor(value * torch.distributed.get_rank())
    torch.distributed.all_reduce(tensor)
    return int(tensor)


def break_on(rank: int) -> str:
    if torch.distributed.get_rank() == rank:
        raise ValueError("no expert 7\nand more lines")
    return "fine"


def break_before_a_collective(rank: int) -> int:
    break_on(rank)
    return total(1)


def exit_on(rank: int) -> None:
    if torch.distributed.get_rank() == rank:
        raise SystemExit(3)


def die_on(rank: int) -> int:
    if torch.distributed.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return total(1)


def sleep_for_ever_on(rank: int) -> int:
    if torch.distributed.get_rank() == rank:
        time.sleep(600)
    return 7


def one_of(tensors: dict[str, torch.Tensor]) -> float:
    """Reads a tensor of the arguments, on every rank."""
    return float(tensors["a"].sum())


class Unreadable:
    """Pickles, and cannot be unpickled."""

    def __reduce__(self):
        return int, ("no number",)


def answer_a_lambda() -> object:
    return lambda: None


def write_together(bad: int) -> None:
    """What an export does with its steps: one rank cannot."""

    def step():
        if torch.distributed.get_rank() == bad:
            raise OSError("no space left")

    _together(step)


@pytest.fixture(scope="module")
def ranks():
    """Pools of this module's own, so that killing their ranks disturbs no other test."""
    with Ranks() as pools:
        yield pools


def failure(ranks: Ranks, *job, world_size: int = 2, **options) -> RankError:
    """The error of a job that must fail, after a check that the next job works all the same."""
    with pytest.raises(RankError) as caught:
        ranks.run(world_size, *job, **options)
    assert ranks.run(world_size, total, 1) == [sum(range(world_size))] * world_size, "the pool is not rebuilt"
    assert len(str(caught.value).splitlines()) == 1
    return caught.value


@pytest.mark.parametrize("bad", [0, 1])
def test_an_error_of_any_rank_in_a_common_step_reaches_all(ranks, bad):
    """It was once the first rank's alone that did, and the first went on before the others were done."""
    error = failure(ranks, write_together, bad)
    assert "no space left" in str(error)
    assert "2 ranks failed" in str(error)


def test_results_come_by_rank(ranks):
    """All ranks run the job with the same arguments: a process each, one thread, in a world of its size."""
    answers = ranks.run(3, hello, "hi")
    assert [a[:3] for a in answers] == [("hi", rank, 1) for rank in range(3)]
    assert len({os.getpid(), *(a[3] for a in answers)}) == 4
    assert ranks.run(3, total, 5) == [15] * 3


def test_ranks_stay_alive_between_jobs_of_one_size(ranks):
    """The same processes answer the next job; another world size gets other processes, and the first are gone."""
    two = [a[3] for a in ranks.run(2, hello, "a")]
    assert [a[3] for a in ranks.run(2, hello, "b")] == two
    one = [a[3] for a in ranks.run(1, hello, "c")]
    assert not {*one} & {*two}
    assert not any(os.path.exists(f"/proc/{pid}") for pid in two)


def test_one_pool_lives_at_a_time(ranks):
    """Idle pools burn cores: another Ranks that starts to work ends this one's pool, which comes back when needed."""
    mine = [a[3] for a in ranks.run(2, hello, "a")]
    with Ranks() as others:
        assert len(others.run(1, hello, "b")) == 1
        assert not any(os.path.exists(f"/proc/{pid}") for pid in mine)
    assert len(ranks.run(2, hello, "c")) == 2


@pytest.mark.parametrize("job", [break_on, break_before_a_collective])
def test_an_exception_is_reported_with_its_rank_and_stack(ranks, job):
    """The message is the error's first line and its rank, also when the other rank waits in a collective; the
    stack names the function."""
    error = failure(ranks, job, 1)
    assert str(error).startswith("ValueError: no expert 7 (on rank 1")
    mine = re.search(r"--- rank 1\n(.*)", error.stack, re.DOTALL)
    assert mine, error.stack
    assert "in break_on" in mine[1]
    assert "and more lines" in mine[1]


def test_a_rank_that_leaves_by_exit_is_a_failure(ranks):
    """SystemExit does not end the rank silently."""
    error = failure(ranks, exit_on, 0)
    assert "SystemExit: 3" in str(error)
    assert "in exit_on" in error.stack


def test_a_killed_rank_is_named(ranks):
    """The dead rank comes first, not the one that only noticed, with the signal and the job."""
    start = time.monotonic()
    error = failure(ranks, die_on, 1)
    assert str(error).startswith("rank 1 was killed by signal 9 (SIGKILL)")
    assert "in die_on" in str(error)
    assert time.monotonic() - start < 30, "it waited for the deadline of a rank that is dead"


def test_a_hung_rank_is_reported_with_where_it_stands(ranks):
    """The message names rank, job and deadline; the stack is the rank's own Python stack."""
    start = time.monotonic()
    error = failure(ranks, sleep_for_ever_on, 0, deadline_s=2)
    assert str(error).startswith("rank 0 gave no answer to sleep_for_ever_on in 2 s")
    assert "in sleep_for_ever_on" in error.stack
    assert "test_ranks.py" in error.stack
    assert time.monotonic() - start < 30


def test_an_answer_that_does_not_pickle_is_an_error(ranks):
    """It is reported as what it is and does not look like a hung or dead rank."""
    error = failure(ranks, answer_a_lambda)
    assert "pickle" in str(error)
    assert "gave no answer" not in str(error)


def test_every_rank_gets_the_tensors_of_the_arguments(ranks):
    """torch passes a tensor's memory once for each pickle: one pickle for all ranks served the first only."""
    assert ranks.run(2, one_of, {"a": torch.arange(5.0)}) == [10.0, 10.0]


def test_an_argument_that_does_not_unpickle_is_an_error_with_its_cause(ranks):
    """And no rank that silently left."""
    assert "ValueError: invalid literal" in str(failure(ranks, hello, Unreadable()))


def test_an_argument_that_does_not_pickle_leaves_the_pool_usable(ranks):
    """No rank has seen half a job."""
    before = [a[3] for a in ranks.run(2, hello, "a")]
    with pytest.raises(Exception, match="pickle"):
        ranks.run(2, total, lambda: None)
    assert [a[3] for a in ranks.run(2, hello, "b")] == before


def test_a_rank_that_died_between_two_jobs_is_a_failure_of_the_next(ranks):
    """And of that one only: the pool is then built anew."""
    pids = [a[3] for a in ranks.run(2, hello, "a")]
    os.kill(pids[0], signal.SIGKILL)
    failure(ranks, total, 1)
    assert pids[0] not in [a[3] for a in ranks.run(2, hello, "b")]


def test_closing_ends_every_rank_and_removes_their_folder():
    """No process and no file stays behind, not even of a rank that is busy."""
    pool = Pool(2)
    pids = [a[3] for a in pool.run(hello, "a")]
    with pytest.raises(RankError):
        pool.run(sleep_for_ever_on, 1, deadline_s=0.5)
    assert not pool.folder.exists()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


# Another torch


def test_fault_J_an_argument_that_a_newer_torch_gives_to_gloo(monkeypatch):
    """One that is off changes nothing; one that is on goes to torch, whose word it is whether it knows it."""
    seen = []
    plain = torch.distributed.ProcessGroupGloo

    class Newer(plain):
        def __init__(self, *args, **options):
            seen.append(options)
            super().__init__(*args)

    monkeypatch.setattr(torch.distributed, "ProcessGroupGloo", Newer)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "ProcessGroupGloo", Newer)
    pool_module._one_event_loop()
    sharing = torch.distributed.distributed_c10d.ProcessGroupGloo
    for reconfigure in (False, True):
        sharing(torch.distributed.HashStore(), 0, 1, timeout=timedelta(seconds=5), enable_reconfigure=reconfigure)
    assert seen == [{}, {"enable_reconfigure": True}]


def test_fault_J_a_torch_whose_gloo_cannot_share_is_named_and_works(monkeypatch, caplog):
    plain = torch.distributed.ProcessGroupGloo
    monkeypatch.setattr(torch.distributed, "ProcessGroupGloo", type("Another", (), {}))
    pool_module._one_event_loop()
    assert f"torch {torch.__version__}: gloo groups cannot share a device" in caplog.text
    assert torch.distributed.distributed_c10d.ProcessGroupGloo is plain
