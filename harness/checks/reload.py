"""The check `reload`: Hugging Face loads what was exported."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

import toy_models
from bridges.checkpoints.comparison import source_digest
from harness.checks.outcome import Outcome
from harness.checks.subject import Bench, Subject
from harness.reference import goldens
from harness.reference.compare import compare


def check_reload(bench: Bench) -> Outcome:
    """The exported folder loads in Hugging Face with no missing and no unexpected key, holds the same weights and computes
    the golden's logits. Folders with the same bytes are loaded once."""
    subject = bench.subject
    folder = bench.export()
    config = (folder / "config.json").read_bytes()
    digest = source_digest(folder) + hashlib.sha256(config).hexdigest()
    if digest not in subject.digests:
        subject.digests[digest] = _reload(subject, folder)
    return subject.digests[digest]


def _reload(subject: Subject, folder: Path) -> Outcome:
    golden = subject.golden
    model, info = toy_models.load(subject.row, folder, dtype=torch.float32, ignore_mismatched_sizes=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, info[problem])):
            return Outcome(False, len(keys), 0, problem.replace("_", " "), f"{problem}: {', '.join(keys[:4])}")
    if toy_models.weights_hash(model) != toy_models.weights_hash(subject.reference):
        found = model.state_dict()
        wrong = [n for n, t in subject.reference.state_dict().items() if not torch.equal(found[n], t)]
        return Outcome(False, len(wrong), 0, "tensors", f"other weights than the row's: {', '.join(wrong[:4])}")
    found = goldens.reference_logits(model.eval(), golden.inputs)
    result = max((compare(found[n], golden.tensors[n], golden.gate) for n in found), key=lambda c: c.value)
    return Outcome(result.ok, result.value, golden.gate, "rel rms", f"same weights; {result.detail}")
