"""One owner for each target, leftovers of the dead taken over, nobody else's file removed, and digests of what Megatron
stores without a sum (attacks 2, 3, 7, 12)."""

import multiprocessing
import os
import signal

import pytest
import torch

import toy_models
from bridges import CheckpointError
from bridges.checkpoints.comparison import same_bytes
from bridges.checkpoints.ownership import JOURNAL, must_be_new, own_folder, scratch_folder
from bridges.checkpoints.reader import Checkpoint
from bridges.checkpoints.writer import CheckpointWriter
from harness import convert

FORK = multiprocessing.get_context("fork")
PLAN = {"model.safetensors": {"a": (torch.float32, (4,))}}
EXTRA = {"config.json": "{}", "parts/chat.jinja": "x"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two checkpoints of one model with different values."""
    base = tmp_path_factory.mktemp("sources")
    one = toy_models.write("llama2", base / "one")
    two = toy_models.write("llama2", base / "two")
    for file in two.glob("*.safetensors"):
        with open(file, "r+b") as handle:
            size = file.stat().st_size
            handle.seek(size - 4)
            handle.write(torch.tensor([0.5]).numpy().tobytes())
    return one, two


@pytest.fixture(scope="module")
def megatron(sources, tmp_path_factory):
    target = tmp_path_factory.mktemp("megatron") / "imported"
    convert.import_checkpoint(sources[0], target, "tp1", False)
    return target


def killed(work, *args) -> None:
    """Run `work` in a forked process, which kills itself in it."""
    process = FORK.Process(target=work, args=args)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def half_an_export(folder, when: str) -> None:
    writer = CheckpointWriter(folder, PLAN)
    writer.create()
    if when == "written":
        die()
    CheckpointWriter._rename = die  # in the fork alone: a partial file in a folder below is there
    writer.commit({"parts/chat.jinja": "x", "config.json": "{}"})


def outcome(tell, source, target) -> None:
    try:
        convert.import_checkpoint(source, target, "tp1", False)
        tell.send("")
    except CheckpointError as error:
        tell.send(str(error))


def test_attack_2_of_two_imports_into_one_target_one_wins_whole(sources, tmp_path):
    """They once shared `.NAME.partial`, and 8 of 17 ended in a mixture of both models with exit 0."""
    target, pipes, processes = tmp_path / "target", [], []
    for source in sources:
        here, there = FORK.Pipe(duplex=False)
        processes.append(FORK.Process(target=outcome, args=(there, source, target)))
        pipes.append(here)
    for process in processes:
        process.start()
    said = [pipe.recv() if pipe.poll(120) else "no answer" for pipe in pipes]
    for process in processes:
        process.join()
    won = [source for source, line in zip(sources, said, strict=True) if not line]
    assert len(won) == 1, said
    assert any(words in "".join(said) for words in ("by another run", "is not empty", "appeared meanwhile"))
    convert.export_checkpoint(target, tmp_path / "back", None, "tp1", False)
    with Checkpoint.open(won[0]) as a, Checkpoint.open(tmp_path / "back") as b:
        assert same_bytes(a, b) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "target"]


def test_attack_2_a_target_in_use_is_said_with_its_process(tmp_path):
    in_use = pytest.raises(CheckpointError, match=rf"being written by another run \(process {os.getpid()}\)")
    with own_folder(tmp_path / "target"), in_use, own_folder(tmp_path / "target"):
        raise AssertionError("both own it")
    assert [p.name for p in tmp_path.iterdir()] == ["target"]
    assert not list((tmp_path / "target").iterdir())


def test_attack_3_a_run_that_is_refused_leaves_the_other_s_files(tmp_path):
    """Two exports into one target both failed, 5 of 8: the refused one tidied up."""
    first = CheckpointWriter(tmp_path / "x", PLAN)
    first.create()
    second = CheckpointWriter(tmp_path / "x", PLAN)
    with pytest.raises(CheckpointError, match="is being written by another run"):
        second.create()
    second.abort()
    with pytest.raises(CheckpointError, match="is being written by another run"):
        must_be_new(tmp_path / "x")
    first.open()
    first.view("a").fill_(1.0)
    first.flush()
    first.commit(EXTRA)
    with Checkpoint.open(tmp_path / "x") as written:
        assert written.view("a").tolist() == [1.0] * 4
    assert not (tmp_path / "x" / JOURNAL).exists()


def test_attack_3_files_of_the_user_stay(tmp_path, sources, megatron, monkeypatch):
    """A failing export once removed every `.*.partial` of the target, whoever had made it."""
    target = tmp_path / "x"
    target.mkdir()

    def fail(self, what, job, *args):
        (target / ".thesis.partial").write_text("mine")
        raise RuntimeError("no")

    monkeypatch.setattr(convert._Conversion, "run", fail)
    with convert._Conversion(sources[0], "tp1", False) as conversion, pytest.raises(RuntimeError, match="no"):
        conversion.export(target, None, False)
    assert (target / ".thesis.partial").read_text() == "mine"


def test_attack_3_a_folder_that_only_looks_like_a_leftover_stays(tmp_path):
    mine = tmp_path / ".target.partial"
    mine.mkdir()
    (mine / "thesis").write_text("mine")
    in_the_way = pytest.raises(CheckpointError, match="is in the way and was not made by goldengate: move it")
    with in_the_way, own_folder(tmp_path / "target"):
        pass
    assert (mine / "thesis").read_text() == "mine"


@pytest.mark.parametrize("when", ["written", "committed"])
def test_attack_12_the_next_export_takes_over_what_a_killed_one_left(tmp_path, when):
    """The folder looked empty, and the rerun said `not empty`; partial files in folders below stayed for ever."""
    killed(half_an_export, tmp_path / "x", when)
    assert any(p.is_file() for p in (tmp_path / "x").rglob(".*.partial"))
    must_be_new(tmp_path / "x")
    again = CheckpointWriter(tmp_path / "x", PLAN)
    again.create()
    again.open()
    again.commit(EXTRA)
    found = sorted(str(p.relative_to(tmp_path / "x")) for p in (tmp_path / "x").rglob("*") if p.is_file())
    assert found == ["config.json", "model.safetensors", "parts/chat.jinja"]


def test_attack_12_what_is_no_leftover_is_named_and_stays(tmp_path):
    killed(half_an_export, tmp_path / "x", "written")
    (tmp_path / "x" / "thesis").write_text("mine")
    with pytest.raises(CheckpointError, match=r"is not empty \(thesis\)"):
        CheckpointWriter(tmp_path / "x", PLAN).create()
    assert (tmp_path / "x" / "thesis").read_text() == "mine"


def test_attack_12_leftovers_of_an_import_and_of_a_round_trip_go(tmp_path):
    """The latter are of the checkpoint's full size, beside it."""

    def import_() -> None:
        with own_folder(tmp_path / "target") as part:
            (part / "big").write_text("x")
            die()

    def roundtrip() -> None:
        folder, _journal = scratch_folder(tmp_path)
        (folder / "exported").mkdir()
        die()

    killed(import_)
    killed(roundtrip)
    (tmp_path / "goldengate-notes").mkdir()
    assert len(list(tmp_path.iterdir())) == 3
    scratch, journal = scratch_folder(tmp_path)
    with own_folder(tmp_path / "target"):
        pass
    assert sorted(tmp_path.iterdir()) == sorted([scratch, tmp_path / "target", tmp_path / "goldengate-notes"])
    assert not list((tmp_path / "target").iterdir())
    journal.close()


def test_attack_7_a_bit_inside_megatron_s_tensors_is_noticed(megatron, tmp_path):
    """Neither Megatron nor torch sums them up: 12 of 130 damaged checkpoints were exported with exit 0."""
    data = max(megatron.rglob("*.distcp"), key=lambda p: p.stat().st_size)
    for position in (data.stat().st_size // 2, data.stat().st_size // 3):
        stock = data.read_bytes()
        try:
            data.write_bytes(stock[:position] + bytes([stock[position] ^ 4]) + stock[position + 1 :])
            with pytest.raises(CheckpointError, match=f"{data.name} has changed since it was imported"):
                convert.export_checkpoint(megatron, tmp_path / "out", None, "tp1", False)
            assert not (tmp_path / "out").exists()
        finally:
            data.write_bytes(stock)
    convert.export_checkpoint(megatron, tmp_path / "out", None, "tp1", False)
