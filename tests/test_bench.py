"""Benchmarks: verdicts from synthetic processes, a ledger that refuses what was edited, rooflines by hand, FLOPs of every
case against the dispatcher, and the CPU cases themselves."""

import copy
import itertools
import json
import os
import random
import runpy
import statistics
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bridges import Layout
from harness import cli
from harness.bench import environment, ledger, measure, run, verdict
from harness.bench.cases import CASES, CONVERSION, MODELS
from harness.bench.causes import Causes, kind_of, split, watched
from harness.bench.ledger import LedgerError
from harness.bench.published import PUBLISHED
from harness.bench.subject import Machine, Subject, build, selected
from harness.ranks import jobs
from harness.reference.compare import relative_rms

ROOT = Path(__file__).parents[1]
CPU = Machine(torch.device("cpu"), toy=True, fused=False)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels are a GPU's")


def record(process: int = 0, seconds: float = 1.0, **changes) -> dict:
    """A line as `keep` in benchmarks/conftest.py makes it."""
    ceiling = measure.Ceiling(8192, "bfloat16", 8e14, 4e12, 2e10)
    return ledger.sealed(
        {
            "time_utc": "2026-11-21T00:00:00+00:00",
            "process": f"p{process}",
            "commit": "0123456789abcdef",
            "dirty": False,
            "label": None,
            "device": {"name": "NVIDIA H100 80GB HBM3", "power_cap_w": "700.00"},
            "versions": {"torch": "2.11.0"},
            "ceiling": vars(ceiling),
            **run.named("dense.model.train", {"config": {"hidden_size": 4096}, "sequence": 4096}),
            "flops": {"convention": "hardware", "kernels": "fused", "total": 10**14, "by_part": {}, "causal_total": 1},
            "bytes": 10**10,
            **run.timed([seconds]),
            **run.rates(1e14, seconds, ceiling),
            "bytes_per_s": None,
            "roofline": measure.roofline(1e14, 1e10, ceiling),
            "peak_bytes": 1,
            **changes,
        }
    )


def side(seconds, first: int = 0, **changes) -> list[dict]:
    return [record(first + i, s, **changes) for i, s in enumerate(seconds)]


def noisy(count: int, middle: float, seed: int, width: float = 0.01) -> list[float]:
    draw = random.Random(seed)
    return [middle * draw.gauss(1, width) for _ in range(count)]


def judged(a, b, **changes) -> verdict.Verdict:
    """Five processes and more on each side, numbered apart."""
    [found] = verdict.compare(side(a), side(b, 100, **changes))
    return found


# -- verdicts --------------------------------------------------------------------------------------------------------


def test_a_clear_slowdown_is_slower_and_the_other_way_faster():
    """10 %, with noise of 1 %, from five processes."""
    slow, fast = noisy(5, 1.1, 1), noisy(5, 1.0, 2)
    found = judged(fast, slow)
    assert (found.outcome, found.p) == ("slower", 2 / 252)
    assert found.change == pytest.approx(0.1, abs=0.02)
    assert judged(slow, fast).outcome == "faster"


def test_noise_alone_is_the_same():
    """At most 1 % of pairs of equal processes may be told apart, however wide their noise; three standard deviations of
    counting more are no proof of the contrary."""
    pairs = 900
    told = [
        judged(noisy(n, 1, s, w), noisy(n, 1, s + 10_000, w)).outcome
        for s, (n, w) in enumerate(itertools.product([5, 6, 9] * (pairs // 9), [0.01, 0.05, 0.2]))
    ]
    assert len(told) == pairs
    assert pairs - told.count("same") <= 0.01 * pairs + 3 * (0.01 * 0.99 * pairs) ** 0.5
    assert "not comparable" not in told


def test_one_outlier_decides_nothing():
    """Neither makes it a slowdown nor hides one that all other processes show."""
    base = [1.0, 1.001, 1.002, 1.003, 1.004]
    assert judged(base, [0.999, 1.0015, 1.0025, 1.0035, 3.0]).outcome == "same"
    assert judged(base, [1.2, 1.201, 1.202, 1.203, 9.0]).outcome == "slower"


def test_a_change_within_the_measured_spread_is_the_same():
    """Processes that fall into two modes differ by luck; and 1 % is no news however sure."""
    found = judged([1.0, 1.01, 1.12, 1.12, 1.13], [1.14, 1.15, 1.15, 1.30, 1.31])
    assert found.p == 2 / 252
    assert found.change is not None
    assert found.spread is not None
    assert 0.02 < found.change < found.spread
    assert found.outcome == "same"
    found = judged([1.0, 1.0001, 1.0002, 1.0003, 1.0004], [1.01, 1.0101, 1.0102, 1.0103, 1.0104])
    assert (found.outcome, found.p) == ("same", 2 / 252)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"device": {"name": "NVIDIA H200", "power_cap_w": "700.00"}},
            "device name: NVIDIA H100 80GB HBM3 and NVIDIA H200",
        ),
        (
            {"device": {"name": "NVIDIA H100 80GB HBM3", "power_cap_w": "350.00"}},
            "device power_cap_w: 700.00 and 350.00",
        ),
        (run.named("dense.model.train", {"config": {"hidden_size": 64}, "sequence": 4096}), "hidden_size 4096 and 64"),
        (run.named("dense.model.train", {"config": {"hidden_size": 4096}, "sequence": 512}), "other sequence"),
        ({"versions": {"torch": "2.12.0"}}, "versions torch: 2.11.0 and 2.12.0"),
    ],
)
def test_what_differs_is_not_comparable(changes, reason):
    """Other device, power cap, dims or versions: no number comes out, however far apart they are."""
    found = judged(noisy(5, 1, 1), noisy(5, 2, 2), **changes)
    assert found.outcome == "not comparable"
    assert reason in found.reason
    assert found.change is None


def test_a_side_of_two_devices_is_not_comparable():
    """Also when the other side has the same two."""
    mixed = side(noisy(4, 1, 1)) + side([1.0], 50, versions={"torch": "2.12.0"})
    [found] = verdict.compare(mixed, side(noisy(5, 2, 2), 100))
    assert (found.outcome, found.reason) == ("not comparable", "versions torch: 2.11.0 and 2.12.0")


@pytest.mark.parametrize("changes", [{"label": "tuned"}, {"commit": "f" * 40}])
def test_a_side_of_two_runs_is_not_comparable(changes):
    """Which are for instance all labels of a commit."""
    a = [*side([1.0] * 5), *side([1.1] * 5, first=5, **changes)]
    for sides in ((a, side([1.0] * 5, first=10)), (side([1.0] * 5, first=10), a)):
        [found] = verdict.compare(*sides)
        assert found.outcome == "not comparable"
        assert "one side is" in found.reason
        assert "FILE@LABEL@COMMIT" in found.reason


def test_too_few_processes_are_not_comparable():
    """Rounds inside a process do not count, and processes that are on both sides neither."""
    assert judged(noisy(4, 1, 1), noisy(4, 2, 2)).reason == "4 processes, 5 on each side are needed"
    assert judged(noisy(9, 1, 1), noisy(1, 2, 2)).reason == "9 and 1 processes, 5 on each side are needed"
    many_rounds = [record(7, 2.0, **run.timed([2.0] * 100))]
    [found] = verdict.compare(side(noisy(5, 1, 1)), many_rounds)
    assert found.outcome == "not comparable"
    [found] = verdict.compare(side(noisy(5, 1, 1)), side(noisy(5, 2, 2), 4))
    assert found.reason == "1 processes are on both sides"


def test_a_case_of_one_side_is_named():
    """Both ways."""
    other = side([1.0] * 5, 100, **run.named("moe.model.train", {"sequence": 4096}))
    found = verdict.compare(side([1.0] * 5), other)
    assert [(v.case, v.reason) for v in found] == [("dense.model.train", "only in A"), ("moe.model.train", "only in B")]


def by_enumeration(a, b) -> float:
    """The same test, the slow way: every choice of positions."""
    values = [*a, *b]
    rank = [sum(w < v for w in values) + (1 + sum(w == v for w in values)) / 2 for v in values]
    mean = len(a) * (len(values) + 1) / 2
    sums = [sum(rank[i] for i in chosen) for chosen in itertools.combinations(range(len(values)), len(a))]
    return sum(abs(s - mean) >= abs(sum(rank[: len(a)]) - mean) for s in sums) / len(sums)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.lists(st.integers(0, 6), min_size=1, max_size=6))
def test_the_rank_test_is_exact_with_ties(a, b):
    """Against every way of dealing the ranks; symmetric in its sides."""
    p = verdict.rank_test(a, b)
    assert p == by_enumeration(a, b) == verdict.rank_test(b, a)


def test_the_rank_test_of_known_tables():
    """5 against 5 wholly apart: 2 of 252 ways. Sizes where enumeration is out of reach stay exact."""
    assert verdict.rank_test(range(5), range(5, 10)) == 2 / 252
    assert verdict.rank_test([1, 2, 3], [1, 2, 3]) == 1
    assert verdict.rank_test(range(30), range(30, 60)) == 2 / 118264581564861424
    for wrong in ([], [float("nan")], [float("inf")]):
        with pytest.raises(ValueError, match="rank test needs"):
            verdict.rank_test([1.0], wrong)


# -- the ledger ------------------------------------------------------------------------------------------------------


def test_lines_are_appended_to_the_file_of_their_device(tmp_path):
    """What was there is still there byte for byte; another device has another file."""
    path = ledger.append(tmp_path, record(0))
    assert path == tmp_path / "nvidia-h100-80gb-hbm3.jsonl"
    before = path.read_bytes()
    assert ledger.append(tmp_path, record(1, 2.0)) == path
    assert path.read_bytes().startswith(before)
    assert [r["median_s"] for r in ledger.read(path)] == [1.0, 2.0]
    other = ledger.append(tmp_path, record(0, device={"name": "NVIDIA H200"}))
    assert other.name == "nvidia-h200.jsonl"
    assert len(ledger.read(path)) == 2


def edited(path: Path, change) -> None:
    lines = path.read_text().splitlines()
    data = json.loads(lines[0])
    change(data)
    path.write_text("\n".join([json.dumps(data), *lines[1:]]) + "\n")


def resealed(data: dict, **changes) -> None:
    data.update(changes)
    data["digest"] = ledger.digest({k: v for k, v in data.items() if k != "digest"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(median_s=0.5), "the line was edited"),
        (lambda d: d["rounds_s"].append(0.5), "the line was edited"),
        (lambda d: d["versions"].update(torch="2.12.0"), "the line was edited"),
        (lambda d: resealed(d, schema="goldengate-bench-0"), "schema 'goldengate-bench-0', this version reads"),
        (lambda d: resealed(d, mfu=0.9), "fields missing or foreign: mfu"),
        (lambda d: resealed(d, settings={"sequence": 1}), "case_hash is not that of its settings"),
        (lambda d: resealed(d, rounds_s=[]), "rounds_s does not hold seconds"),
        (lambda d: resealed(d, median_s="1"), "median_s is '1'"),
        (lambda d: resealed(d, device={"name": "NVIDIA H200"}), "belongs into nvidia-h200.jsonl"),
        (lambda d: resealed(d, process="p1"), "twice"),
    ],
)
def test_a_ledger_with_a_line_that_is_not_in_order_is_refused(tmp_path, change, message):
    """For reading, and for appending: the file stays as it is."""
    for i in range(2):
        path = ledger.append(tmp_path, record(i))
    edited(path, change)
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=message):
        ledger.read(path)
    with pytest.raises(LedgerError, match=message):
        ledger.append(tmp_path, record(2))
    assert path.read_bytes() == before


def test_a_broken_file_and_a_broken_record_are_refused(tmp_path):
    """A line cut off, a line that is no JSON, a process twice, a number that is none."""
    path = ledger.append(tmp_path, record(0))
    whole = path.read_text()
    with pytest.raises(LedgerError, match=r"p0 has dense\.model\.train already"):
        ledger.append(tmp_path, record(0, 2.0))
    with pytest.raises(LedgerError, match="bytes is 'many'"):
        ledger.append(tmp_path, record(1, bytes="many"))
    with pytest.raises(ValueError, match="JSON compliant"):
        record(1, float("nan"))
    assert path.read_text() == whole
    path.write_text(whole[:-1])
    with pytest.raises(LedgerError, match="cut off"):
        ledger.read(path)
    path.write_text(whole + "{\n")
    with pytest.raises(LedgerError, match=r"jsonl:2: not JSON"):
        ledger.read(path)


def test_selections_are_files_commits_and_labels(tmp_path):
    """FILE, FILE@COMMIT, FILE@LABEL, FILE@LABEL@COMMIT, also where the file has an @ of its own; nothing found is an error,
    and so is a commit of six letters."""
    lines = [("a" * 40, None), ("b" * 40, "tuned"), ("b" * 40, None), ("c" * 40, "tuned")]
    for i, (commit, label) in enumerate(lines):
        path = ledger.append(tmp_path / "host@home", record(i, commit=commit, label=label))
    expected = {"": 4, "@aaaaaaa": 1, "@" + "b" * 40: 2, "@tuned": 2, "@tuned@bbbbbbb": 1, "@ccccccc@tuned": 1}
    assert {word: len(ledger.select(f"{path}{word}")) for word in expected} == expected
    for wrong in (
        f"{path}@aaaaaa",
        f"{path}@ddddddd",
        f"{path}@tuned@aaaaaaa",
        f"{path}@",
        f"{path}@tuned@",
        f"{tmp_path / 'none.jsonl'}",
    ):
        with pytest.raises(LedgerError, match=r"none\.jsonl|no line|is needed"):
            ledger.select(wrong)


# -- numbers ---------------------------------------------------------------------------------------------------------


def test_the_roofline_by_hand():
    """2e12 FLOPs at 1e12 a second and 3e9 bytes at 1e9 a second: 2 s and 3 s; rates are FLOPs over measured seconds."""
    at = measure.Ceiling(8192, "bfloat16", 1e12, 1e9, 5e8)
    expected = {"compute_seconds": 2.0, "memory_seconds": 3.0, "seconds": 3.0, "serial_seconds": 5.0}
    assert measure.roofline(2e12, 3e9, at) == expected
    assert measure.roofline(2e12, 3e9, replace(at, bytes_per_s=3e9))["seconds"] == 2.0
    assert run.rates(2e12, 4.0, at) == {"tflops": 0.5, "fraction_of_ceiling": 0.5}


def test_a_round_is_divided_by_its_steps(monkeypatch):
    """Every input set once a round; what is between steps is part of the round."""
    now, ran = [0.0], []

    def step(i):
        ran.append(i)
        now[0] += 0.25

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    clock = measure.Clock(torch.device("cpu"), 4, step, lambda: None)
    clock.round()
    assert (clock.seconds, ran) == ([0.25], [0, 1, 2, 3])
    found = measure.median_seconds(torch.device("cpu"), step, steps=2, rounds=3)
    assert found == 0.25


def test_the_bytes_of_a_block_by_hand(ranks):
    """The dense MLP in fp32: parameters once, what goes into and out of its two linears (the norm is in the first), and
    between them the activation, which no module has."""
    [found] = ranks.run(1, bytes_of, "dense.mlp")
    tokens, hidden, ffn = 2 * 64, 64, 96
    parameters = hidden + hidden * 2 * ffn + ffn * hidden
    activations = tokens * (hidden + 2 * ffn) + tokens * (ffn + hidden)
    activations += 2 * tokens * ffn
    forward = 4 * (parameters + activations)
    assert found == {"dense.mlp.forward": forward, "dense.mlp.train": 3 * forward}


def bytes_of(prefix: str) -> dict[str, int]:
    jobs.use_layout(Layout())
    cases = [case for case in CASES if case.name.startswith(prefix)]
    built = build(cases[0].model, CPU)
    return {case.name: Subject(case, built).bytes for case in cases}


def test_the_flops_of_every_case_are_what_the_dispatcher_counts(ranks):
    """One step of each case, forward and backward, to the integer. A selection that leaves a part out must differ."""
    for found in ranks.run(1, counted_flops):
        for name, (by_formula, counted) in found.items():
            assert by_formula == counted > 0, name
        assert len(found) == len(CASES)
    [(formula, counted)] = ranks.run(1, counted_flops, "dense.attention.train", ("qkv", "o_proj"))[0].values()
    assert 0 < formula < counted


def counted_flops(only: str = "", parts: tuple | None = None) -> dict[str, tuple[int, int]]:
    from harness.flops.counter import counting

    jobs.use_layout(Layout())
    found: dict[str, tuple[int, int]] = {}
    for model in MODELS:
        cases = [case for case in CASES if case.model is model and case.name.startswith(only)]
        built = build(model, CPU) if cases else None
        for case in cases:
            assert built is not None
            subject = Subject(replace(case, parts=parts) if parts else case, built)
            subject.warm_up()
            with counting({"": built.chunk}) as counter:
                subject.step(0)
            subject.forget_gradients()
            found[case.name] = (sum(selected(subject.case, built.count("hardware")).values()), counter.total)
    return found


# -- cases -----------------------------------------------------------------------------------------------------------


def test_real_dims_are_the_published_ones():
    """But for what a model says it changes; only the number of layers, of which kind, and the vocabulary of conversion."""
    for model in (*MODELS, CONVERSION):
        real = model.config(toy=False)
        assert set(model.changes) <= {
            "num_hidden_layers",
            "first_k_dense_replace",
            "num_nextn_predict_layers",
            "vocab_size",
        }
        assert {k: v for k, v in real.items() if k not in model.changes}.items() <= PUBLISHED[model.published].items()
        assert model.config(toy=True)["hidden_size"] == 64 < real["hidden_size"]
    assert len({case.name for case in CASES}) == len(CASES)


def test_a_refused_backward_is_forward_only(monkeypatch):
    """With the kernels' own words; any other error, and any error of a forward, stays one."""
    train, forward = (next(c for c in CASES if c.name == f"gdn.delta_net.{d}") for d in ("train", "forward"))

    class Refusing:
        message = "Triton >= 3.4.0 on Hopper computes wrong gated chunk_bwd_dqkwg (see #640).\nInstall TileLang"

        def __init__(self, case, built):
            pass

        def warm_up(self):
            raise RuntimeError(self.message)

    monkeypatch.setattr(run, "Subject", Refusing)
    nothing = SimpleNamespace()
    with pytest.raises(run.ForwardOnly, match=r"see #640\)\. Install TileLang"):
        run.measure(train, nothing, nothing, nothing)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError) as caught:
        run.measure(forward, nothing, nothing, nothing)  # type: ignore[arg-type]
    assert not isinstance(caught.value, run.ForwardOnly)
    Refusing.message = "CUDA out of memory"
    with pytest.raises(RuntimeError, match="out of memory") as caught:
        run.measure(train, nothing, nothing, nothing)  # type: ignore[arg-type]
    assert not isinstance(caught.value, run.ForwardOnly)


def test_the_environment_of_a_tree_without_a_repository(monkeypatch, tmp_path):
    """The commit is unknown there; a package that is not there has no version."""
    commit, dirty = environment.commit()
    assert commit == "unknown" or (len(commit) == 40 and dirty in (True, False))
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert environment.commit() == ("unknown", None)
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-such-package"))
    found = environment.versions()
    assert torch.__version__.startswith(str(found["torch"]))
    assert found["no-such-package"] is None


RUN = """
import sys
for name in ("typer", "rich", "matplotlib"):
    sys.modules[name] = None  # not there on the GPU machine
import pytest, time
common = ["benchmarks", "-q", "-p", "no:cacheprovider", "--benchmark-min-rounds=1"]
first = pytest.main([*common, "-k", "mlp"])
began = time.process_time()
second = pytest.main([*common, "--ledger", sys.argv[1], "--label", "here"])
print("\\nsecond run:", time.process_time() - began)
sys.exit(first or second)
"""


def test_the_cpu_cases_run(tmp_path):
    """pytest benchmarks at toy dims: every case makes one line, only where a ledger was asked for, without the packages that
    a GPU machine lacks, in less than a minute of processor time beside the imports."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)],
        cwd=ROOT,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    [path] = tmp_path.iterdir()
    records = ledger.read(path)
    assert [r["case"] for r in records if "." in r["case"]] == ["conversion.import", "conversion.export"] + [
        case.name for case in CASES
    ]
    assert len({r["process"] for r in records}) == 1
    for r in records:
        assert r["label"] == "here"
        assert statistics.median(r["rounds_s"]) == r["median_s"]
        if not r["case"].startswith("conversion"):
            total = sum(r["flops"]["by_part"].values())
            assert total == r["flops"]["total"] >= r["flops"]["causal_total"] > 0
            assert r["tflops"] == pytest.approx(total / r["median_s"] / 1e12)
    assert f"{CASES[0].name} " in done.stdout
    assert "of the ceiling" in done.stdout
    assert float(done.stdout.rsplit("second run:", 1)[1]) < 60


@pytest.mark.parametrize(("options", "message"), [(["causes"], "sees no GPU"), (["causes", "ledger"], "one by one")])
def test_causes_need_a_gpu_and_no_ledger(monkeypatch, options, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    conftest = runpy.run_path(str(ROOT / "benchmarks/conftest.py"))
    config = SimpleNamespace(getoption=lambda name: name.removeprefix("--") in options)
    with pytest.raises(pytest.UsageError, match=message):
        conftest["pytest_configure"](config)


def test_the_suite_does_not_run_benchmarks():
    """They have a folder of their own, which pytest takes only when it is named."""
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["testpaths"] == [
        "tests"
    ]


# -- the command -----------------------------------------------------------------------------------------------------


def goldengate(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["goldengate", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


@pytest.fixture
def two_runs(tmp_path):
    """A ledger with five processes of `old`, and of `new`, which is 20 % slower."""
    for label, first, middle in (("old", 0, 0.2), ("new", 100, 0.24)):
        for r in side(noisy(5, middle, first), first, label=label):
            path = ledger.append(tmp_path, r)
    return path


def test_compare_says_slower_and_exits_1(two_runs, monkeypatch, capsys):
    """The other way it is faster and exits 0; the same side twice compares nothing and exits 1."""
    old, new = f"{two_runs}@old", f"{two_runs}@new"
    assert goldengate(monkeypatch, "bench", "compare", old, new, "--json", "-") == 1
    [found] = json.loads(capsys.readouterr().out)
    assert (found["case"], found["outcome"]) == ("dense.model.train", "slower")
    assert goldengate(monkeypatch, "bench", "compare", new, old) == 0
    assert "faster" in capsys.readouterr().out
    assert goldengate(monkeypatch, "bench", "compare", old, old) == 1
    assert goldengate(monkeypatch, "bench", "compare", old, f"{two_runs}@none") == 2
    assert "no line of commit or label 'none'" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_plot_draws_a_picture(two_runs, tmp_path, monkeypatch, capsys, kind):
    """Whose SVG names the case and both runs; another format, or a ledger without FLOPs, is an error."""
    out = tmp_path / f"page.{kind}"
    assert goldengate(monkeypatch, "bench", "plot", two_runs, "--out", out) == 0
    if kind == "png":
        assert out.read_bytes().startswith(b"\x89PNG")
    else:
        drawn = out.read_text()
        assert all(f"<!-- {word}" in drawn for word in ("dense.model.train", "old", "new"))
    assert goldengate(monkeypatch, "bench", "plot", two_runs, "--out", tmp_path / "page.gif") == 2
    assert "one of .png, .svg" in capsys.readouterr().err
    bare = copy.deepcopy(record(0, tflops=None))
    path = ledger.append(tmp_path / "bare", bare)
    assert goldengate(monkeypatch, "bench", "plot", path, "--out", out) == 2


def test_causes_by_hand():
    """Two steps of 5 s: of two kernels at once the first counts, gaps are idle, an unknown name is said."""
    kernels = [
        ("nvjet_tst_128x256", 10.0, 12.0),
        ("void at::native::vectorized_elementwise_kernel<4>", 11.0, 13.0),
        ("chunk_gated_delta_rule_fwd_kernel_h", 15.0, 16.0),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", 16.0, 18.0),
        ("who_knows", 19.0, 19.5),
    ]
    calls = [
        ("cudaLaunchKernel", 9.0, 9.5),
        ("cuLaunchKernelEx", 10.0, 10.5),
        ("cudaStreamSynchronize", 11.0, 13.0),
        ("cudaEventSynchronize", 19.0, 19.5),
        ("cudaMemcpyAsync", 19.5, 20.0),
        ("cudaEventQuery", 20.0, 20.5),
    ]
    causes = split(kernels[::-1], calls, steps=2, seconds=5.0)
    assert causes.kinds == {
        "matrix products": 1.0,
        "elementwise": 0.5,
        "delta rule": 0.5,
        "attention": 1.0,
        "other": 0.25,
    }
    assert causes.idle == 5.0 - (3 + 1 + 2 + 0.5) / 2
    assert causes.total == 5.0 == causes.idle + sum(causes.kinds.values())
    assert (causes.waits, causes.calls) == (1.5, 0.75)
    assert causes.launches == 2.5
    assert causes.unknown == ("who_knows",)
    assert causes.line().startswith("5000.00 ms: idle 1750.00, matrix products 1000.00")
    assert causes.line().endswith("; host waits 1500.00, CUDA calls 750.00; 2 launches; other: who_knows")
    slower = split(kernels, steps=2, seconds=1.0)
    assert (slower.idle, slower.total) == (0.0, 3.25)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90>", "attention"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 128>(void const*)", "attention"),
        ("_permute_kernel", "gather and sort"),
        ("_make_chunk_sort_map_kernel", "gather and sort"),
        ("_row_id_map_pass_1_kernel", "gather and sort"),
        ("chunk_local_cumsum_scalar_kernel", "delta rule"),
        ("kernel_kernel", "delta rule"),
        ("void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel", "norms"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("rotary_fwd_q_kernel", "rope"),
        ("cross_entropy_kernel", "loss"),
        ("void cublasLt::splitKreduce_kernel<32, 16>", "matrix products"),
        ("nothing known", None),
    ],
)
def test_kinds_of_kernels(kernel, kind):
    assert kind_of(kernel) == kind


def causes_of_products() -> Causes:
    """On a rank: of a product that takes milliseconds, and a copy to the host after it."""
    jobs.use_layout(Layout())
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    torch.mm(matrix, matrix)
    clock = measure.Clock(matrix.device, 1, lambda _: torch.mm(matrix, matrix)[0].cpu(), lambda: None)
    clock.round()
    clock.round()
    return split(*watched(clock.run), steps=1, seconds=clock.seconds[1])


@pytest.mark.gpu
@needs_gpu
def test_causes_of_known_kernels(ranks):
    """The profiler's kernels are those that ran, in seconds."""
    [found] = ranks.run(1, causes_of_products)
    assert found.kinds.keys() >= {"matrix products", "copies"}
    assert 0.5 * found.total < found.kinds["matrix products"] < 1.2 * found.total
    assert found.launches < 10
    assert not found.unknown
    assert found.waits > 0.5 * found.total  # the copy waits for the product
    assert found.calls > 0  # 2.5 ms on an H200: the first launch under a profiler is slow


def loss_and_gradients(model, fused: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """On a rank: the losses [batch, sequence] of a toy model in fp32 on a GPU, and the gradients of their sum."""
    jobs.use_layout(Layout())
    torch.manual_seed(0)
    built = build(model, Machine(torch.device("cuda"), toy=True, fused=fused))
    chunk = built.chunk
    generator = torch.Generator("cuda").manual_seed(1)
    for parameter in chunk.parameters():
        parameter.data.normal_(std=0.1, generator=generator)
    tokens, labels = torch.randint(built.provider.vocab_size, (2, model.batch, 64), generator=generator, device="cuda")
    positions = torch.arange(64, device="cuda")[None].expand(model.batch, -1)
    loss = chunk(tokens, positions, None, labels=labels)
    loss.sum().backward()
    gradients = {name: p.grad.cpu() for name, p in chunk.named_parameters() if p.grad is not None}
    return loss.detach().cpu(), gradients


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("model", [m for m in MODELS if m.name != "gdn"], ids=lambda model: model.name)
def test_fused_kernels_change_no_result(model, ranks):
    """Losses and every gradient in fp32. The fields of gdn are those of moe."""
    [(loss, gradients)] = ranks.run(1, loss_and_gradients, model, False)
    [(fused, theirs)] = ranks.run(1, loss_and_gradients, model, True)
    assert torch.isfinite(loss).all()
    assert relative_rms(fused, loss) <= 1e-5
    assert gradients.keys() == theirs.keys()
    assert max(relative_rms(theirs[name], gradients[name]) for name in gradients) <= 1e-4


def test_plot_without_matplotlib_says_which_extra(two_runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert goldengate(monkeypatch, "bench", "plot", two_runs, "--out", tmp_path / "page.svg") == 2
    assert "a picture needs matplotlib: pip install 'goldengate[bench]'" in capsys.readouterr().err
