"""The check `roundtrip`: imported in one layout and exported from another, bit for bit."""

from __future__ import annotations

import numpy as np

from bridges.checkpoints.comparison import same_bytes, source_digest
from bridges.checkpoints.reader import Checkpoint
from harness.checks.outcome import Outcome, first_few
from harness.checks.subject import Bench
from harness.ranks import jobs


def check_roundtrip(bench: Bench) -> Outcome:
    """Import in another layout, reshard to this one by Megatron's own distributed-checkpoint metadata, export from here:
    the same names, shapes, dtypes, files and bits as the source, which is untouched."""
    subject = bench.subject
    origin, whole = subject.whole_from or str(bench.layout), subject.whole
    mine = gather_shards(bench.run(jobs.take_shards))
    differences: list[str] = []
    results = bench.run(jobs.put_shards, whole if whole is not None else mine)
    for rank, (_, names) in enumerate(results):
        differences += [f"rank {rank}: {name} as imported in {origin} differs from the import here" for name in names]
    subject.whole, subject.whole_from = mine, str(bench.layout)

    exported = bench.export()
    bench.run(jobs.restore)  # the other checks are about this layout's own import
    with Checkpoint.open(exported) as out:
        differences += same_bytes(subject.source, out)
        elements = sum(int(np.prod(i.shape)) for i in out.tensors.values())
    if source_digest(subject.source.path) != subject.source_sha:
        differences.append("the source checkpoint was changed")
    detail = first_few(differences)
    compared = sum(count for count, _ in results)
    return Outcome(
        not differences,
        len(differences),
        0,
        "tensors",
        detail or f"{origin} -> {bench.layout}: {compared} shards and {elements} elements bit-equal",
    )


def gather_shards(by_rank) -> jobs.Global:
    """The whole model from its main replicas."""
    whole: jobs.Global = {}
    for shards in by_rank:
        for key, shape, offset, values in shards:
            target = whole.setdefault(key, np.zeros(shape, values.dtype))
            target[tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))] = values
    return whole
