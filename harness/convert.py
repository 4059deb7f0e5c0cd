"""`goldengate convert`: real checkpoints on forked ranks of this machine, with progress and memory."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import resource
import shutil
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bridges import AutoBridge, CheckpointError, Layout
from bridges.checkpoints.companions import companions
from bridges.checkpoints.comparison import same_bytes
from bridges.checkpoints.megatron import ITERATION, check_digests, locate, write_digests, write_identity
from bridges.checkpoints.ownership import check_free, clear, must_be_new, own_folder, scratch_folder
from bridges.checkpoints.pickles import check_metadata, restricted
from bridges.checkpoints.reader import Checkpoint
from bridges.conversion.agreement import of_all_ranks
from bridges.providers import cpu_substitutions
from bridges.providers.groups import ensure_process_groups
from harness.checks.outcome import first_few
from harness.quiet import quiet
from harness.ranks import jobs
from harness.ranks.pool import Ranks
from harness.report.console import Console
from harness.report.conversion import say

DEADLINE_S = 24 * 3600.0
DTYPES = ("float32", "bfloat16", "float16")
MAX_RANKS = 64  # forked ranks on one machine

OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")  # tensors that training keeps beside the weights

_counter = None  # shared by the forked ranks: parameters done


def roundtrip(
    source: Path,
    layout_text: str,
    target: Path | None,
    trust: bool | None,
    *,
    dtype: str | None = None,
    lossy: bool = False,
) -> dict[str, Any]:
    """Import, in Megatron's hands as `dtype` (else as the config says), and export in the source's dtypes; returns seconds, bytes, each rank's peak memory and the differences (none when exact)."""
    if not source.is_dir():
        raise CheckpointError(f"{source} is not a folder: give a Hugging Face checkpoint")
    if target is not None:
        must_be_new(target)
    scratch, journal = scratch_folder(None if target else source.parent)
    out = target or scratch / "exported"
    try:
        with _Conversion(source, layout_text, trust, dtype) as conversion:
            took = conversion.run("import", _import, lossy)
            wrote = conversion.export(out, None, lossy)
            memory = conversion.memory()
        start = time.perf_counter()
        with Checkpoint.open(source) as a, Checkpoint.open(out) as b:
            differences = same_bytes(a, b)
        compared = time.perf_counter() - start
        result = {
            "layout": str(conversion.layout),
            "bytes": conversion.nbytes,
            "import_s": took,
            "export_s": wrote,
            "compare_s": compared,
            "peak_mib": memory,
            "differences": differences,
        }
        say(result)
        return result
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        journal.close(remove=False)


def import_checkpoint(
    source: Path,
    target: Path,
    layout_text: str,
    trust: bool | None,
    *,
    dtype: str | None = None,
    lossy: bool = False,
) -> dict[str, Any]:
    """Hugging Face -> Megatron's own distributed checkpoint of `dtype` (else as the config says), written by all ranks."""
    must_be_new(target)
    with _Conversion(source, layout_text, trust, dtype) as conversion, own_folder(target) as part:
        took = conversion.run("import", _import, lossy)
        if (free := shutil.disk_usage(target.parent).free) < conversion.nbytes:
            raise CheckpointError(f"{target} takes {conversion.nbytes} bytes, {free} are free; make room")
        (part / ITERATION).mkdir()
        saved = conversion.run("save", _save, str(part / ITERATION))
        bridge = conversion.bridge
        write_identity(part, bridge.hf_pretrained.checkpoint, bridge.ignored_tensors(bridge.hf_pretrained.checkpoint))
        write_digests(part)
        return {
            "layout": str(conversion.layout),
            "bytes": conversion.nbytes,
            "import_s": took,
            "save_s": saved,
            "peak_mib": conversion.memory(),
        }


def export_checkpoint(
    source: Path,
    target: Path,
    reference: Path | None,
    layout_text: str,
    trust: bool | None,
    *,
    dtype: str | None = None,
    lossy: bool = False,
) -> dict[str, Any]:
    """A Megatron distributed checkpoint -> a Hugging Face folder with the names, files and dtypes (or `dtype`) of its source,
    which the checkpoint's folder says, or else `reference`.

    Raises CheckpointError for a reference that is another model than the checkpoint's.
    """
    as_dtype = _dtype(dtype)
    checkpoint, identity = locate(source)
    must_be_new(target)
    if reference is None and identity is None:
        raise CheckpointError(f"{source} does not say which model it is of: give a Hugging Face folder of it with --hf")
    if reference is not None and identity is not None:
        _must_be_of(identity, reference, trust)
    check_metadata(checkpoint)
    if identity is not None:
        check_digests(identity, checkpoint)
    with _Conversion(reference or identity, layout_text, trust) as conversion:
        took = conversion.run("load", _load, str(checkpoint))
        wrote = conversion.export(target, as_dtype, lossy)
        return {
            "layout": str(conversion.layout),
            "bytes": conversion.nbytes,
            "load_s": took,
            "export_s": wrote,
            "peak_mib": conversion.memory(),
        }


def _must_be_of(identity: Path, reference: Path, trust: bool | None) -> None:
    """Raise CheckpointError, naming the fields, when the Megatron folder is of another model than the reference."""
    mine, other = (AutoBridge.from_hf_pretrained(folder, trust) for folder in (identity, reference))
    a, b = ({"bridge": type(one._model_bridge).__name__, **_built(one)} for one in (mine, other))
    if wrong := [f"{name} {a.get(name)!r} and {b.get(name)!r}" for name in {**a, **b} if a.get(name) != b.get(name)]:
        raise CheckpointError(f"{identity} is of another model than {reference}: {first_few(wrong, 4)}")


def _built(bridge: AutoBridge) -> dict[str, Any]:
    """The provider's fields that make the model, whatever it is stored in."""
    fields = vars(bridge.to_megatron_provider(load_weights=False)).items()
    stored = ("params_dtype", "bf16", "fp16")
    return {k: v for k, v in fields if k not in stored and isinstance(v, int | float | str | list | tuple | dict)}


def _dtype(name: str | None) -> torch.dtype | None:
    if name not in (None, *DTYPES):
        raise ValueError(f"--dtype {name!r} is not known; choose one of {', '.join(DTYPES)}")
    return getattr(torch, name) if name else None


class _Conversion:
    """Ranks that hold the model of a checkpoint in a layout, and a progress bar over what they do."""

    def __init__(self, source: Path | None, layout_text: str, trust: bool | None, dtype: str | None = None):
        global _counter
        assert source is not None
        quiet()
        as_dtype = _dtype(dtype)
        self.layout = Layout.parse(layout_text)
        if self.layout.world_size > MAX_RANKS:
            raise ValueError(
                f"layout {self.layout} has {self.layout.world_size} ranks; this machine forks at most {MAX_RANKS}"
            )
        # Everything that can be wrong with the input is found here, before any rank is forked or file is made.
        self.bridge = bridge = AutoBridge.from_hf_pretrained(source, trust)
        bridge.to_megatron_provider(load_weights=False).apply_layout(self.layout).check_layout()
        companions(source)
        self.nbytes = sum(info.nbytes for info in bridge.hf_pretrained.checkpoint.tensors.values())
        if not torch.cuda.is_available():
            cpu_substitutions.install()
        torch.set_num_threads(1)
        import multiprocessing

        _counter = multiprocessing.get_context("fork").Value("q", 0)
        self.ranks = Ranks()
        self.total = sum(
            self.ranks.run(
                self.layout.world_size, _build, str(source), trust, self.layout, as_dtype, deadline_s=DEADLINE_S
            )
        )

    def run(self, what: str, job, *args) -> float:
        """Seconds that a job took on all ranks, with a bar over parameters."""
        assert _counter is not None
        counter = _counter
        counter.value = 0
        start, done = time.perf_counter(), threading.Event()
        columns = (
            TextColumn(f"{what} {self.layout}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("parameters"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=self.total)

            def watch():
                while not done.wait(0.1):
                    bar.update(task, completed=counter.value)

            watcher = threading.Thread(target=watch, daemon=True)
            watcher.start()
            try:
                self.ranks.run(self.layout.world_size, job, *args, deadline_s=DEADLINE_S)
            finally:
                done.set()
                watcher.join()
                bar.update(task, completed=counter.value)
        return time.perf_counter() - start

    def export(self, target: Path, dtype: torch.dtype | None, lossy: bool) -> float:
        """`run` the export; when it fails `target` is as it was, also when a rank was killed and could not tidy up."""
        existed = target.exists()
        check_free(target)
        try:
            return self.run("export", _export, str(target), dtype, lossy)
        except BaseException:
            self.ranks.close()  # who are dead or done for: the journal is free
            with contextlib.suppress(CheckpointError):  # another run's
                clear(target)
            if not existed:
                with contextlib.suppress(OSError):
                    target.rmdir()
            raise

    def memory(self) -> list[dict[str, float]]:
        return self.ranks.run(self.layout.world_size, _memory)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.ranks.close()


# -- on ranks --------------------------------------------------------------------------------------------------------


def _build(source: str, trust: bool | None, layout: Layout, dtype: torch.dtype | None) -> int:
    """Build the model, unfilled; returns the number of this rank's parameters."""
    jobs.use_layout(layout)
    bridge = AutoBridge.from_hf_pretrained(source, trust)
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.perform_initialization = False
    if dtype is not None:
        provider.params_dtype = dtype
        provider.bf16, provider.fp16 = dtype == torch.bfloat16, dtype == torch.float16
    provider.apply_layout(layout).finalize()
    ensure_process_groups(provider, layout)
    jobs.set_current(jobs.Current(bridge, provider, provider.provide_distributed_model(wrap_with_ddp=False)))
    return len(bridge.get_conversion_tasks(jobs.current().chunks))


def _count(_name: str) -> None:
    if _counter is None:
        return  # with a GPU ranks are new processes, which do not share it: the bar waits for the end
    with _counter.get_lock():
        _counter.value += 1


def _import(lossy: bool) -> None:
    this = jobs.current()
    this.bridge.load_hf_weights(this.chunks, lossy=lossy, progress=_count)


def _export(target: str, dtype: torch.dtype | None, lossy: bool) -> None:
    this = jobs.current()
    this.bridge.save_hf_pretrained(this.chunks, target, dtype=dtype, lossy=lossy, progress=_count)


def _save(target: str) -> None:
    import queue

    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # Its writers are threads of this rank; Megatron would start a manager process, which imports the program once more.
    filesystem_async._results_queue = queue.Queue()  # type: ignore[assignment]
    logging.getLogger("megatron").setLevel(logging.CRITICAL)  # what it logs as an error it raises as well
    with _reason(f"cannot write {target}"):
        dist_checkpointing.save({**_sharded_state(), **_common_state()}, target, validate_access_integrity=False)


def _load(source: str) -> None:
    from megatron.core import dist_checkpointing

    with restricted(), _reason(f"cannot load {source} as this model"):
        metadata = dist_checkpointing.load_tensors_metadata(source)
        _widen_to(metadata)
    with restricted(), _reason(f"cannot load {source} as this model"):
        state: Any = dist_checkpointing.load(_sharded_state(), source)
    wanted = set().union(*of_all_ranks({tensor.key for tensor in jobs.sharded_tensors()}))
    held = (name for name in metadata if not OPTIMIZER.match(name))
    if extra := sorted(set(held) - wanted):
        raise CheckpointError(f"cannot load {source} as this model, which has no place for {first_few(extra, 1)}")
    for key, chunk in jobs.current().keyed_chunks():
        chunk.load_state_dict(state[key], strict=False)


def _widen_to(held: dict[str, Any]) -> None:
    """Give this rank's tensors a dtype that holds every value of the checkpoint: Megatron would narrow without a word."""
    dtypes = {tensor.dtype for name, tensor in held.items() if not OPTIMIZER.match(name)}
    for dtype in filter(lambda dtype: isinstance(dtype, torch.dtype) and dtype.is_floating_point, dtypes):
        for _, chunk in jobs.current().keyed_chunks():
            chunk._apply(
                lambda t, dtype=dtype: t.to(torch.promote_types(t.dtype, dtype)) if t.is_floating_point() else t
            )


@contextlib.contextmanager
def _reason(what: str):
    """An error of Megatron's checkpoints says which ranks failed; why they did is inside."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        first, _ = next(iter(error.failures.values()))
        raise CheckpointError(f"{what}: {textwrap.shorten(str(first), 200)}") from error


def _common_state() -> dict[str, Any]:
    """What Megatron-LM wants to find beside the tensors when it resumes: plain values, the same on every rank."""
    import argparse

    provider = jobs.current().provider
    plain = {k: v for k, v in vars(provider).items() if isinstance(v, int | float | str) and not k.startswith("_")}
    args = argparse.Namespace(**plain, padded_vocab_size=provider.padded_vocab_size, consumed_train_samples=0)
    return {"args": args, "checkpoint_version": 3.0, "iteration": 0}


def _sharded_state() -> dict[str, Any]:
    return {key: chunk.sharded_state_dict() for key, chunk in jobs.current().keyed_chunks()}


def _memory() -> dict[str, float]:
    """MiB: peak resident, private (what this rank does not share with others or with files), parameters."""
    with open("/proc/self/smaps_rollup") as lines:
        sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines if "kB" in line}
    parameters = sum(t.numel() * t.element_size() for c in jobs.current().chunks for t in c.parameters())
    return {
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "private": (sizes["Private_Dirty"] + sizes.get("Swap", 0)) / 1024,
        "parameters": parameters / 2**20,
        "pid": os.getpid(),
    }
