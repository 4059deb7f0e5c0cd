"""Faults at random moments: kills of the parent in the middle of a conversion, two runs at once, mutated configs. Nothing may be
left running, nobody may wait for ever, no wrong tensor may come with success."""

import copy
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

import toy_models
from bridges import AutoBridge, CheckpointError, Layout
from bridges.checkpoints.comparison import same_bytes
from bridges.checkpoints.reader import Checkpoint
from bridges.errors import GoldengateError
from bridges.hf_pretrained import PreTrainedCausalLM, load_config
from harness import convert

FORK = multiprocessing.get_context("fork")
ROWS = ("llama3", "qwen3_moe", "deepseek_v3", "qwen3_next", "gemma2", "phi3")  # of different mechanisms
VALUES = (None, "x", "", -1, 0, 3, 2**31, 1e30, float("nan"), [], {}, [1], {"a": 1}, True, 1.5, "7")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return toy_models.write("llama2", tmp_path_factory.mktemp("faults") / "hf")


@pytest.fixture
def times(request):
    """`times(fast, whole)`: how often to try; conftest.py prints it."""

    def choose(fast: int, whole: int) -> int:
        count = whole if request.config.getoption("--faults") else fast
        request.node.user_properties.append(("faults", count))
        return count

    return choose


def group(leader: int) -> list[int]:
    """The processes of a process group that run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(pgrp) == leader and state != "Z":
            found.append(int(stat.parent.name))
    return found


def roundtrip(source, target) -> None:
    os.setpgid(0, 0)
    convert.roundtrip(source, "tp2", target, False)


def import_(source, target, tell) -> None:
    try:
        convert.import_checkpoint(source, target, "tp1", False)
        tell.send("")
    except CheckpointError as error:
        tell.send(str(error))


def test_attack_1_and_12_kill_9_at_random_moments(source, tmp_path, times):
    """0 orphans after two seconds; what is there is whole or taken over by the next run into the same target."""
    draw, target = random.Random(1), tmp_path / "target"
    for _ in range(times(3, 50)):
        process = FORK.Process(target=roundtrip, args=(source, target))
        process.start()
        time.sleep(draw.uniform(0.05, 1.5))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        end = time.monotonic() + 2
        while (left := group(process.pid)) and time.monotonic() < end:
            time.sleep(0.02)
        assert not left, "ranks outlive their parent"
        if target.is_dir() and any(target.iterdir()) and not (target / ".goldengate.journal").exists():
            with Checkpoint.open(source) as a, Checkpoint.open(target) as b:
                assert same_bytes(a, b) == []
            for file in target.iterdir():
                file.unlink()
    assert convert.roundtrip(source, "tp2", target, False)["differences"] == []


def test_attack_2_two_runs_at_once(source, tmp_path, times):
    """One wins, whole; the other says why it does not."""
    for i in range(times(1, 20)):
        pairs = [FORK.Pipe(duplex=False) for _ in range(2)]
        runs = [FORK.Process(target=import_, args=(source, tmp_path / f"t{i}", there)) for _, there in pairs]
        for run in runs:
            run.start()
        said = [here.recv() if here.poll(120) else "no answer" for here, _ in pairs]
        for run in runs:
            run.join()
        assert said.count("") == 1, said
        assert "no answer" not in said
        convert.export_checkpoint(tmp_path / f"t{i}", tmp_path / f"b{i}", None, "tp1", False)
        with Checkpoint.open(source) as a, Checkpoint.open(tmp_path / f"b{i}") as b:
            assert same_bytes(a, b) == []


def test_attack_11_mutated_configs(tmp_path, times):
    """A model or one line, never another exception."""
    draw, many = random.Random(2), []
    for _ in range(times(20, 2000)):
        raw = copy.deepcopy(toy_models.config_dict(draw.choice(ROWS)))
        name, value = draw.choice(sorted(raw)), draw.choice(VALUES)
        raw[name] = value
        try:
            config = load_config(copy.deepcopy(raw), tmp_path, False)
            made = AutoBridge(PreTrainedCausalLM(config, raw)).to_megatron_provider(load_weights=False)
            made.apply_layout(Layout(tp=2)).check_layout()
            made.finalize()
        except GoldengateError:
            continue
        except Exception as error:
            many.append(f"{raw['architectures']} {name}={value!r}: {type(error).__name__}: {error}")
    assert not many, many
