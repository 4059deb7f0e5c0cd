"""Reading and writing checkpoint folders: against the safetensors library, broken files, many processes."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bridges.checkpoints.comparison import same_bytes, source_digest
from bridges.checkpoints.reader import DTYPES, INDEX_FILE, SINGLE_FILE, Checkpoint, CheckpointError
from bridges.checkpoints.writer import CheckpointWriter
from tests.strategies import checkpoint_files

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
U8 = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


def bits(tensor: torch.Tensor) -> bytes:
    """The tensor's memory, so that NaN equals itself and the dtype's own comparison is not trusted."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Same names, dtypes, shapes and bits."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor), name


def save_folder(folder: Path, files: dict[str, dict[str, torch.Tensor]]) -> Path:
    """A good folder, written by the safetensors library, with an index where one is needed."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "toy"}')
    for file, tensors in files.items():
        save_file(tensors, folder / file, {"format": "pt"})
    if list(files) != [SINGLE_FILE]:
        weight_map = {name: file for file, tensors in files.items() for name in tensors}
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def save_one(folder: Path) -> Path:
    """A good folder of one file with tensors a (4 x 3 float32) and b (5 bfloat16)."""
    return save_folder(folder, {SINGLE_FILE: {"a": torch.randn(4, 3), "b": torch.randn(5).bfloat16()}})


def save_two(folder: Path) -> Path:
    """A good folder of two shards: a and b in the first, c in the second."""
    return save_folder(folder, {ONE: {"a": torch.randn(4, 3), "b": torch.ones(2)}, TWO: {"c": torch.randn(3)}})


def raw(header: object, data: bytes = b"") -> bytes:
    """The bytes of a safetensors file with this header, given as bytes or as what JSON makes of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def plan_of(checkpoint: Checkpoint) -> dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """What a writer needs to lay out the same files."""
    tensors = checkpoint.tensors
    return {file: {n: (tensors[n].dtype, tensors[n].shape) for n in names} for file, names in checkpoint.files.items()}


def write_folder(folder: Path, files: dict[str, dict[str, torch.Tensor]], **options) -> None:
    """Write `files` with our writer, in one process."""
    plan = {file: {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} for file, tensors in files.items()}
    writer = CheckpointWriter(folder, plan, **options)
    writer.create()
    writer.open()
    for tensors in files.values():
        for name, tensor in tensors.items():
            writer.view(name).copy_(tensor)
    writer.flush()
    writer.commit({"config.json": '{"model_type": "toy"}'})


def all_dtypes() -> dict[str, torch.Tensor]:
    """A 2 x 3 tensor, a 0-dim one and an empty one of every dtype."""
    tensors = {}
    for kind, dtype in DTYPES.items():
        values = torch.tensor([[0, 1, 2], [3, 4, 5]]).to(dtype)
        tensors |= {
            f"{kind}.matrix": values,
            f"{kind}.scalar": values[0, 1].clone(),
            f"{kind}.empty": values[:, :0],
        }
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


# Reading ----------------------------------------------------------------------------------------------------


def test_reads_what_the_library_wrote(tmp_path):
    """Every dtype, 0-dim and empty tensors included, has the bits that the library's own loader gives."""
    folder = save_folder(tmp_path / "x", {SINGLE_FILE: all_dtypes()})
    with Checkpoint.open(folder) as checkpoint:
        assert_equal({name: checkpoint.view(name) for name in checkpoint.tensors}, load_file(folder / SINGLE_FILE))
        assert checkpoint.config == {"model_type": "toy"}
        assert checkpoint.metadata == {SINGLE_FILE: {"format": "pt"}}
        assert not checkpoint.has_index


def test_offsets_are_the_files(tmp_path):
    """`offset` and `nbytes` cut exactly the tensor's bytes out of its file."""
    with Checkpoint.open(save_two(tmp_path / "x")) as checkpoint:
        assert checkpoint.has_index
        assert checkpoint.files == {ONE: ["a", "b"], TWO: ["c"]}
        for name, info in checkpoint.tensors.items():
            content = (checkpoint.path / info.file).read_bytes()
            assert content[info.offset : info.offset + info.nbytes] == bits(checkpoint.view(name))


def test_view_is_zero_copy_and_contiguous(tmp_path):
    """Two views of one tensor share memory."""
    with Checkpoint.open(save_one(tmp_path / "x")) as checkpoint:
        first, second = checkpoint.view("a"), checkpoint.view("a")
        assert first.data_ptr() == second.data_ptr()
        assert first.is_contiguous()


def test_view_touches_only_the_pages_it_reads(tmp_path):
    """Copying from one row of a 64 MB tensor maps a few MB of the file (the kernel's large folios)."""
    folder = save_folder(tmp_path / "x", {SINGLE_FILE: {"a": torch.zeros(64, 1 << 20, dtype=torch.uint8)}})
    with Checkpoint.open(folder) as checkpoint:
        checkpoint.view("a")[40, :1000].clone()
        smaps = Path("/proc/self/smaps").read_text().split(str(folder / SINGLE_FILE))[1]
        resident_kb = int(smaps.split("Rss:")[1].split()[0])
        assert 0 < resident_kb < 8 * 1024


def test_a_file_larger_than_memory_opens(tmp_path):
    """A private writable mapping of twice the machine's RAM is allowed and readable to its last byte."""
    size = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    folder = save_one(tmp_path / "x")
    with open(folder / SINGLE_FILE, "wb") as file:
        file.write(raw({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}))
        file.truncate(file.tell() + size)
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.view("a")[-1] == 0


def test_written_view_leaves_the_source_alone(tmp_path):
    """What is written through a view is seen by this process and never by the file."""
    folder = save_two(tmp_path / "x")
    before = source_digest(folder)
    with Checkpoint.open(folder) as checkpoint:
        checkpoint.view("a").fill_(7)
        assert (checkpoint.view("a") == 7).all()
    assert source_digest(folder) == before
    with Checkpoint.open(folder) as checkpoint:
        assert not (checkpoint.view("a") == 7).any()


def test_source_digest_sees_a_bit_and_a_name(tmp_path):
    """One flipped bit or one renamed file changes the digest; a folder without weights is an error."""
    folder = save_two(tmp_path / "x")
    before = source_digest(folder)
    content = bytearray((folder / TWO).read_bytes())
    content[-1] ^= 1
    (folder / TWO).write_bytes(content)
    flipped = source_digest(folder)
    (folder / TWO).rename(folder / "other.safetensors")
    assert len({before, flipped, source_digest(folder)}) == 3
    with pytest.raises(CheckpointError, match="no safetensors file to digest"):
        source_digest(save_one(tmp_path / "y").parent / "none")


def test_unaligned_tensor_is_copied(tmp_path):
    """A float32 tensor behind a single byte reads right, though no zero-copy view of it is possible."""
    folder = save_one(tmp_path / "x")
    header = {
        "flag": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "values": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / SINGLE_FILE).write_bytes(raw(text, b"\x01" + bits(torch.tensor([1.5, -2.0]))))
    before = source_digest(folder)
    with Checkpoint.open(folder) as checkpoint:
        values = checkpoint.view("values")
        assert checkpoint.tensors["values"].offset % 4 == 1
        assert values.data_ptr() % 4 == 0
        assert values.tolist() == [1.5, -2.0]
        values.zero_()
    assert source_digest(folder) == before


def test_view_outlives_close(tmp_path):
    """close() takes no memory away from a view that is held; a new view is refused."""
    checkpoint = Checkpoint.open(save_one(tmp_path / "x"))
    held = checkpoint.view("a")
    expected = held.clone()
    checkpoint.close()
    assert torch.equal(held, expected)
    with pytest.raises(CheckpointError, match="is closed: open it again to read 'a'"):
        checkpoint.view("a")


def test_unknown_name_suggests_the_nearest(tmp_path):
    """A misspelt name is answered with the name that was meant, of the right layer, first."""
    names = [f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(20) for p in "qkvo"]
    folder = save_folder(tmp_path / "x", {SINGLE_FILE: {name: torch.zeros(1) for name in names}})
    with Checkpoint.open(folder) as checkpoint:
        with pytest.raises(CheckpointError, match=r"nearest known: model.layers.3.self_attn.q_proj.weight, "):
            checkpoint.view("model.layers.3.self_attn.q_proj.wieght")
        with pytest.raises(CheckpointError, match=r"no tensor '#'; nearest known: nothing like it"):
            checkpoint.view("#")


def test_files_beside_the_index_are_ignored(tmp_path):
    """A consolidated.safetensors that the index does not name is no part of the checkpoint."""
    folder = save_two(tmp_path / "x")
    save_file({"a": torch.zeros(1)}, folder / "consolidated.safetensors")
    with Checkpoint.open(folder) as checkpoint:
        assert list(checkpoint.files) == [ONE, TWO]


def test_hub_cache_links_are_followed(tmp_path):
    """huggingface_hub's cache holds links to ../../blobs: they lead out of the folder and are right."""
    blobs, snapshot = tmp_path / "models--toy" / "blobs", tmp_path / "models--toy" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    save_folder(blobs, {ONE: {"a": torch.ones(2)}, TWO: {"b": torch.ones(2)}})
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    with Checkpoint.open(snapshot) as checkpoint:
        assert list(checkpoint.tensors) == ["a", "b"]


# Broken folders ---------------------------------------------------------------------------------------------


def replace(file: str, content: bytes | str) -> Callable[[Path], object]:
    """A breakage: the file holds this instead."""
    return lambda folder: (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(file: str, count: int) -> Callable[[Path], None]:
    """A breakage: the file's last bytes are gone."""
    return lambda folder: os.truncate(folder / file, (folder / file).stat().st_size - count)


def index(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """A breakage: the index's weight_map is changed in place."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / INDEX_FILE).read_text())
        change(content["weight_map"])
        (folder / INDEX_FILE).write_text(json.dumps(content))

    return apply


def link_out(file: str) -> Callable[[Path], None]:
    """A breakage: the file lies outside and is linked to."""

    def apply(folder: Path) -> None:
        (folder / file).rename(folder.parent / "outside.safetensors")
        (folder / file).symlink_to(folder.parent / "outside.safetensors")

    return apply


def entry(**changes) -> bytes:
    """A file with one tensor `a` of 4 bytes whose header entry is changed; None removes a field."""
    fields = {key: value for key, value in (U8 | changes).items() if value is not None}
    return raw({"a": fields}, b"1234")


def pair(start: int, end: int, data: bytes) -> bytes:
    """A file with tensors `a` at [0, 4] and `b` at [start, end]."""
    return raw({"a": U8, "b": U8 | {"data_offsets": [start, end]}}, data)


BROKEN_HEADERS = {
    "no header length": (b"1234567", "is truncated: 7 bytes hold no header"),
    "empty": (b"", "is truncated: 0 bytes hold no header"),
    "header over 100 MB": (b"\xff" * 64, "claims a header of 18446744073709551615 bytes, over 100 MB"),
    "header truncated": (raw({"a": U8})[:-2], "is truncated: its header misses 2 bytes"),
    "header length too small": (b"\x02" + raw({"a": U8}, b"1234")[1:], "header that is not JSON"),
    "header length too large": (b"\x44" + raw({"a": U8}, b"12345678")[1:], "header that is not JSON"),
    "header not JSON": (raw(b"{not json}"), "header that is not JSON: Expecting property name"),
    "header not UTF-8": (raw(b'{"\xff":1}'), "header that is not JSON: 'utf-8' codec can't decode"),
    "header with NaN": (raw(b'{"a":NaN}'), "header that is not JSON: NaN is no JSON number"),
    "header too deep": (raw(b"[" * 100_000), "header that is not JSON"),
    "header a list": (raw([1]), "header that is a JSON list"),
    "metadata a number": (
        raw({"__metadata__": {"x": 1}}),
        "__metadata__ that does not map strings to strings",
    ),
    "metadata a list": (raw({"__metadata__": []}), "__metadata__ that does not map strings to strings"),
    "entry a number": (raw({"a": 1}), "tensor 'a' has no proper dtype, shape, data_offsets"),
    "no dtype": (entry(dtype=None), "tensor 'a' has no proper dtype"),
    "dtype a list": (entry(dtype=[]), "tensor 'a' has no proper dtype"),
    "no shape": (entry(shape=None), "tensor 'a' has no proper dtype, shape"),
    "shape a number": (entry(shape=4), "tensor 'a' has no proper dtype, shape"),
    "negative shape": (entry(shape=[-4]), "tensor 'a' has no proper dtype, shape"),
    "fractional shape": (entry(shape=[4.0]), "tensor 'a' has no proper dtype, shape"),
    "boolean shape": (entry(shape=[4, True]), "tensor 'a' has no proper dtype, shape"),
    "three offsets": (entry(data_offsets=[0, 4, 8]), "tensor 'a' has no proper dtype, shape, data_offsets"),
    "half a surrogate": (
        raw(b'{"\\ud800":' + json.dumps(U8).encode() + b"}", b"1234"),
        "surrogates not allowed",
    ),
    "unknown dtype": (entry(dtype="X9"), "tensor 'a' has dtype X9; known are F64 F32 F16 BF16"),
    "dtype nobody expects": (entry(dtype="F4", shape=[8]), "tensor 'a' has dtype F4; known are"),
    "bytes are not shape x dtype": (entry(dtype="F32"), "tensor 'a' has 4 bytes, but F32 [4] takes 16"),
    "end before start": (
        entry(shape=[1], data_offsets=[4, 0]),
        "tensor 'a' has -4 bytes, but U8 [1] takes 1",
    ),
    "overlap": (pair(2, 6, b"123456"), "tensor 'b' overlaps 'a'"),
    "same bytes twice": (pair(0, 4, b"1234"), "tensor 'b' overlaps 'a'"),
    "hole": (pair(5, 9, b"123456789"), "tensor 'b' leaves a hole of 1 bytes after 'a'"),
    "hole at the start": (entry(data_offsets=[4, 8]), "tensor 'a' leaves a hole of 4 bytes after the header"),
    "data truncated": (pair(4, 8, b"12345"), "is truncated: 3 of "),
    "data after the end": (pair(4, 8, b"123456789"), "has 1 bytes that no tensor owns at its end"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN_HEADERS.values(), ids=BROKEN_HEADERS)
def test_broken_file(tmp_path, content, message):
    """A damaged file is refused, here as by the library, in one line that names it and the damage."""
    folder = save_one(tmp_path / "x")
    (folder / SINGLE_FILE).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    text = str(caught.value)
    assert message in text
    assert text.startswith(str(folder / SINGLE_FILE))
    assert "\n" not in text
    if b'"F4"' not in content:  # which the library knows
        with pytest.raises((safetensors.SafetensorError, RecursionError)):
            safetensors.deserialize(content)


BROKEN_FOLDERS = {
    "no folder": (save_one, shutil.rmtree, "is not a folder: give one with config.json"),
    "no config": (
        save_one,
        lambda f: (f / "config.json").unlink(),
        "config.json cannot be read: No such file",
    ),
    "config not JSON": (save_one, replace("config.json", "{"), "config.json is not JSON"),
    "config a list": (save_one, replace("config.json", "[]"), "config.json holds a JSON list, not an object"),
    "no weights": (
        save_one,
        lambda f: (f / SINGLE_FILE).unlink(),
        f"has neither {SINGLE_FILE} nor {INDEX_FILE}: ",
    ),
    "no index": (save_two, lambda f: (f / INDEX_FILE).unlink(), f"nor {INDEX_FILE}, only {ONE}: fetch it"),
    "index not JSON": (save_two, replace(INDEX_FILE, "weight_map"), f"{INDEX_FILE} is not JSON"),
    "index a list": (save_two, replace(INDEX_FILE, "[]"), f"{INDEX_FILE} holds a JSON list"),
    "no weight_map": (save_two, replace(INDEX_FILE, "{}"), f"{INDEX_FILE} has no weight_map"),
    "weight_map of numbers": (save_two, replace(INDEX_FILE, '{"weight_map": {"a": 1}}'), "has no weight_map"),
    "shard truncated": (save_two, cut(TWO, 5), f"{TWO} is truncated: 5 of "),
    "shard missing": (
        save_two,
        lambda f: (f / TWO).unlink(),
        f"names {TWO}, a shard missing from the folder",
    ),
    "all shards missing": (
        save_two,
        lambda f: ((f / ONE).unlink(), (f / TWO).unlink()),
        f"names {ONE} and 1 more, a shard missing from the folder",
    ),
    "shard a folder": (
        save_two,
        index(lambda m: m.update(c=".")),
        "names ., a shard missing from the folder",
    ),
    "weights a folder": (
        save_one,
        lambda f: ((f / SINGLE_FILE).unlink(), (f / SINGLE_FILE).mkdir()),
        f"{SINGLE_FILE} is no regular file",
    ),
    "absolute path": (save_two, index(lambda m: m.update(c="/etc/passwd")), "'/etc/passwd', which leads out"),
    "path with ..": (save_two, index(lambda m: m.update(c=f"../x/{TWO}")), f"'../x/{TWO}', which leads out"),
    "shard linked out": (
        save_two,
        link_out(TWO),
        "outside.safetensors, outside the folder: copy the file into it",
    ),
    "single file linked out": (save_one, link_out(SINGLE_FILE), "outside.safetensors, outside the folder"),
    "tensor in two shards": (
        save_two,
        lambda f: save_file({"a": torch.ones(1), "c": torch.ones(1)}, f / TWO),
        f"tensor 'a' is in both {ONE} and {TWO}: remove one",
    ),
    "tensor in another file": (
        save_two,
        index(lambda m: m.update(a=TWO)),
        f"lists 'a' in {TWO}, which does not hold it; it is in {ONE}",
    ),
    "tensor in no file": (
        save_two,
        index(lambda m: m.update(d=TWO)),
        f"lists 'd' in {TWO}, which does not hold it; no file does",
    ),
    "tensor not in the index": (
        save_two,
        index(lambda m: m.pop("b")),
        f"{ONE} holds 'b', which {INDEX_FILE} does",
    ),
    "single file beside the index": (
        save_two,
        lambda f: save_file({"a": torch.ones(1)}, f / SINGLE_FILE),
        f"has {SINGLE_FILE} and an index that does not name it; transformers would load the former",
    ),
}


@pytest.mark.parametrize(("save", "damage", "message"), BROKEN_FOLDERS.values(), ids=BROKEN_FOLDERS)
def test_broken_folder(tmp_path, save, damage, message):
    """A folder that does not agree with itself is refused in one line that names folder and culprit."""
    folder = save(tmp_path / "x")
    Checkpoint.open(folder).close()
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@given(
    shapes=st.lists(st.lists(st.integers(0, 3), max_size=2), max_size=4),
    where=st.integers(0, 7),
    shift=st.integers(-2, 2),
    extra=st.integers(-1, 1),
    backwards=st.booleans(),
)
@settings(deadline=None, max_examples=200)
def test_accepts_what_the_library_accepts(shapes, where, shift, extra, backwards):
    """With an offset shifted or a byte too many or few, in any order, our parser and the library's agree."""
    header, end = {}, 0
    for i, shape in enumerate(shapes):
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[f"t{i}"] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    if where // 2 < len(shapes):
        header[f"t{where // 2}"]["data_offsets"][where % 2] += shift
    header = dict(reversed(header.items())) if backwards else header
    content = raw(header, b"\x01" * max(0, end + extra))
    try:
        safetensors.deserialize(content)
        accepted = True
    except safetensors.SafetensorError:
        accepted = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text("{}")
        (folder / SINGLE_FILE).write_bytes(content)
        with contextlib.nullcontext() if accepted else pytest.raises(CheckpointError):
            offsets = [info.offset for info in Checkpoint.open(folder).tensors.values()]
            assert offsets == sorted(offsets)


# Writing ----------------------------------------------------------------------------------------------------


def test_the_library_reads_what_we_write(tmp_path):
    """Every dtype, 0-dim and empty tensors included, through load_file and through safe_open."""
    tensors = all_dtypes()
    write_folder(tmp_path / "x", {SINGLE_FILE: tensors})
    assert_equal(load_file(tmp_path / "x" / SINGLE_FILE), tensors)
    with safetensors.safe_open(tmp_path / "x" / SINGLE_FILE, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert_equal({name: file.get_tensor(name) for name in file.keys()}, tensors)  # noqa: SIM118
    assert sorted(os.listdir(tmp_path / "x")) == ["config.json", SINGLE_FILE]


@given(files=checkpoint_files())
@settings(deadline=None, max_examples=60)
def test_write_read_roundtrip(files):
    """Any names, shapes and dtypes: what is written reads back bit for bit, aligned, here and there."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "x"
        write_folder(folder, files)
        with Checkpoint.open(folder) as checkpoint:
            assert {file: set(names) for file, names in checkpoint.files.items()} == {
                f: set(t) for f, t in files.items()
            }
            for file, tensors in files.items():
                assert_equal({n: checkpoint.view(n) for n in checkpoint.files[file]}, tensors)
                assert_equal(load_file(folder / file), tensors)
            assert all(info.offset % info.dtype.itemsize == 0 for info in checkpoint.tensors.values())


@given(files=checkpoint_files())
@settings(deadline=None, max_examples=40)
def test_rewriting_the_librarys_files_gives_the_same_bytes(files):
    """Read the library's folder, lay out the plan it implies, copy: every file is byte-identical."""
    with tempfile.TemporaryDirectory() as name:
        source, target = save_folder(Path(name) / "source", files), Path(name) / "target"
        with Checkpoint.open(source) as checkpoint:
            writer = CheckpointWriter(target, plan_of(checkpoint))
            writer.create()
            writer.open()
            for tensor in checkpoint.tensors:
                writer.view(tensor).copy_(checkpoint.view(tensor))
            writer.commit({"config.json": "{}"})
            assert writer.tensors == checkpoint.tensors
            assert same_bytes(checkpoint, Checkpoint.open(target)) == []
        for file in files:
            assert (target / file).read_bytes() == (source / file).read_bytes()
        assert source_digest(target) == source_digest(source)


def test_plan_says_the_sizes(tmp_path):
    """`total_bytes` is known before anything is on disk, and a plan touches nothing."""
    plan = {ONE: {"a": (torch.uint8, (3,)), "b": (torch.float64, (2,))}, TWO: {"c": (torch.bfloat16, ())}}
    writer = CheckpointWriter(tmp_path / "x", plan, metadata={})
    assert not (tmp_path / "x").exists()
    assert writer.tensors["b"].offset < writer.tensors["a"].offset  # by falling element size
    assert writer.tensors["b"].offset % 8 == 0
    writer.create()
    assert sum(file.stat().st_size for file in (tmp_path / "x").glob(".*.partial")) == writer.total_bytes
    writer.commit({"config.json": "{}"})
    index = json.loads((tmp_path / "x" / INDEX_FILE).read_text())
    assert list(index["weight_map"]) == ["a", "b", "c"]
    assert index == {"metadata": {"total_size": 21}, "weight_map": {"a": ONE, "b": ONE, "c": TWO}}
    assert Checkpoint.open(tmp_path / "x").metadata == {ONE: {}, TWO: {}}


def test_index_on_request(tmp_path):
    """One file has no index unless asked for; one file that is not model.safetensors always has."""
    tensors = {"a": torch.ones(1)}
    write_folder(tmp_path / "asked", {SINGLE_FILE: tensors}, index=True)
    write_folder(tmp_path / "needed", {"model-00001-of-00001.safetensors": tensors})
    assert Checkpoint.open(tmp_path / "asked").has_index
    assert Checkpoint.open(tmp_path / "needed").has_index


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_two_processes_fill_one_tensor(tmp_path):
    """Two forked processes, each with its own plan, write interleaved columns of the same tensor."""
    expected = torch.arange(64 * 32).view(64, 32).bfloat16()
    plan = {ONE: {"a": (torch.bfloat16, (64, 32))}, TWO: {"b": (torch.bool, (2,))}}
    writer = CheckpointWriter(tmp_path / "x", plan)
    writer.create()
    children = []
    for rank in range(2):
        if (child := os.fork()) == 0:
            try:
                mine = CheckpointWriter(tmp_path / "x", plan)
                mine.open()
                mine.view("a")[:, rank::2].copy_(expected[:, rank::2])
                mine.view("b")[rank] = bool(rank)
                mine.flush()
                mine.close()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    writer.commit({"config.json": "{}"})
    with Checkpoint.open(tmp_path / "x") as checkpoint:
        assert torch.equal(checkpoint.view("a"), expected)
        assert checkpoint.view("b").tolist() == [False, True]


def test_nothing_is_readable_before_commit(tmp_path):
    """A folder that is being written holds no checkpoint, and another writer says so."""
    plan = {ONE: {"a": (torch.float32, (2,))}, TWO: {"b": (torch.float32, (2,))}}
    first = CheckpointWriter(tmp_path / "x", plan)
    first.create()
    assert not list((tmp_path / "x").glob("*.safetensors"))
    (tmp_path / "x" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has neither"):
        Checkpoint.open(tmp_path / "x")
    (tmp_path / "x" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="is being written by another run"):
        CheckpointWriter(tmp_path / "x", plan).create()


def test_commit_writes_the_index_last(tmp_path, monkeypatch):
    """Extra files, then tensors, then the index; a crash before any rename leaves nothing readable."""
    plan = {ONE: {"a": (torch.float32, (2,))}, TWO: {"b": (torch.float32, (2,))}}
    rename, order = os.replace, []

    def record(source: Path, target: Path) -> None:
        with pytest.raises(CheckpointError):
            Checkpoint.open(tmp_path / "x")
        order.append(target.name)
        rename(source, target)

    monkeypatch.setattr(os, "replace", record)
    writer = CheckpointWriter(tmp_path / "x", plan)
    writer.create()
    writer.commit({"config.json": "{}", "tokenizer.model": b"\xff"})
    assert order == ["config.json", "tokenizer.model", ONE, TWO, INDEX_FILE]
    assert (tmp_path / "x" / "tokenizer.model").read_bytes() == b"\xff"
    Checkpoint.open(tmp_path / "x").close()


def test_abort_removes_what_was_created(tmp_path, monkeypatch):
    """Before and amid a commit, down to the folder if it was not there; after one, nothing."""
    plan = {SINGLE_FILE: {"a": (torch.float32, (2,))}}
    (tmp_path / "old").mkdir()
    for folder, kept in ((tmp_path / "new", False), (tmp_path / "old", True)):
        writer = CheckpointWriter(folder, plan, index=True)
        writer.create()
        writer.abort()
        assert folder.exists() == kept
        assert not kept or not os.listdir(folder)

    writer = CheckpointWriter(tmp_path / "new", plan, index=True)
    writer.create()
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_index_text", lambda: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(CheckpointError, match=r"cannot complete .*Input/output error.*abort\(\) removes"):
            writer.commit({"config.json": "{}"})
    assert (tmp_path / "new" / SINGLE_FILE).exists()
    writer.abort()
    assert not (tmp_path / "new").exists()

    writer = CheckpointWriter(tmp_path / "new", plan)
    writer.create()
    writer.commit({"config.json": "{}"})
    writer.abort()
    assert sorted(os.listdir(tmp_path / "new")) == ["config.json", SINGLE_FILE]


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A tmpfs of this size; skips where mounting is not permitted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(tmp_path):
    """A disk of 256 KB has no room for two files of 200 KB: one error with both numbers, nothing left."""
    plan = {file: {file: (torch.uint8, (200 * 1024,))} for file in (ONE, TWO)}
    with small_disk(tmp_path / "disk", 256) as disk:
        writer = CheckpointWriter(disk / "x", plan)
        message = rf"cannot reserve {writer.total_bytes} bytes in .*No space left on device, {256 * 1024} bytes are"
        with pytest.raises(CheckpointError, match=message):
            writer.create()
        assert not os.listdir(disk)


def test_full_disk_simulated(tmp_path, monkeypatch):
    """The same where no disk can be mounted."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    writer = CheckpointWriter(tmp_path / "x", {SINGLE_FILE: {"a": (torch.uint8, (10,))}})
    with pytest.raises(CheckpointError, match=rf"cannot reserve {writer.total_bytes} bytes .*No space left on device"):
        writer.create()
    assert not (tmp_path / "x").exists()


def test_refused_plans(tmp_path):
    """A plan that no checkpoint can have is refused before anything is on disk."""
    a, b = (torch.float32, (2,)), (torch.complex64, (2,))
    for files, options, message in (
        ({}, {}, "no file to write"),
        ({"sub/model.safetensors": {"a": a}}, {}, "'sub/model.safetensors' is not a plain name"),
        ({"model.bin": {"a": a}}, {}, "'model.bin' is not a plain name ending in .safetensors"),
        ({SINGLE_FILE: {"b": b}}, {}, "'b' has dtype torch.complex64; known are F64"),
        ({SINGLE_FILE: {"__metadata__": a}}, {}, "no tensor can have the name '__metadata__'"),
        ({ONE: {"a": a}, TWO: {"a": a}}, {}, f"tensor 'a' is already in {ONE}"),
        ({ONE: {"a": a}}, {"index": False}, "without an index the only file must be"),
        ({SINGLE_FILE: {"a": a}}, {"metadata": {"x": "y" * 100_000_000}}, "over 100 MB: use more files"),
    ):
        with pytest.raises(CheckpointError, match=message):
            CheckpointWriter(tmp_path / "x", files, **options)


def test_refused_targets(tmp_path):
    """A folder in use, a missing parent, a file in the way."""
    plan = {SINGLE_FILE: {"a": (torch.float32, (2,))}}
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for folder, message in (
        (tmp_path / "used", r"is not empty \(notes.txt\): empty it or choose another folder"),
        (tmp_path / "none" / "x", "none is not a folder: make it before writing x"),
        (tmp_path / "file", "cannot reserve .* bytes in .*File exists"),
    ):
        writer = CheckpointWriter(folder, plan)
        with pytest.raises(CheckpointError, match=message):
            writer.create()
        writer.abort()
    assert (tmp_path / "used" / "notes.txt").read_text() == (tmp_path / "file").read_text() == "mine"


def test_misuse_of_a_writer(tmp_path):
    """Views before open, unknown names, plans that differ between processes, colliding extra files."""
    writer = CheckpointWriter(tmp_path / "x", {SINGLE_FILE: {"a": (torch.float32, (2,))}})
    with pytest.raises(CheckpointError, match="cannot be mapped: No such file"):
        writer.open()
    writer.create()
    with pytest.raises(CheckpointError, match=r"open\(\) it in this process before writing 'a'"):
        writer.view("a")
    with pytest.raises(CheckpointError, match="the plan has no tensor 'b'"):
        writer.view("b")
    other = CheckpointWriter(tmp_path / "x", {SINGLE_FILE: {"b": (torch.float32, (2,))}})
    with pytest.raises(CheckpointError, match="laid out by a plan that is not this one"):
        other.open()
    for name in (SINGLE_FILE, INDEX_FILE, "../config.json", "/config.json"):
        with pytest.raises(CheckpointError, match="cannot be an extra file: use another name"):
            writer.commit({name: ""})


# Comparing --------------------------------------------------------------------------------------------------


def test_same_bytes_names_every_difference(tmp_path):
    """Missing, unexpected, dtype, shape, file and elements, each in one line; equal tensors in none."""
    value = torch.zeros(4, 5, dtype=torch.bfloat16)
    changed = value.clone()
    changed[2, 1], changed[3, 4] = 0.5, -0.0  # -0.0 equals 0.0 as a number, not as bits
    common = {name: value.clone() for name in ("same", "gone", "dtype", "shape", "moved", "values")}
    ours = common | {
        "dtype": value.half(),
        "shape": value.view(5, 4).clone(),
        "values": changed,
        "new": value,
    }
    del ours["gone"], ours["moved"]
    a = Checkpoint.open(save_folder(tmp_path / "a", {ONE: common, TWO: {"z": torch.zeros(1)}}))
    b = Checkpoint.open(save_folder(tmp_path / "b", {ONE: ours, TWO: {"moved": value, "z": torch.zeros(1)}}))
    assert sorted(same_bytes(a, b, chunk_elements=3)) == [
        "dtype: dtype torch.bfloat16 != torch.float16",
        "gone: missing",
        f"moved: file {ONE} != {TWO}",
        "new: unexpected",
        "shape: shape (4, 5) != (5, 4)",
        "values: 2 of 20 elements differ, first at [2, 1]: 0.0 != 0.5",
    ]


def test_same_bytes_of_every_dtype(tmp_path):
    """A folder equals its copy, NaN included; with one bit flipped in every tensor each of them is named."""
    tensors = all_dtypes() | {"nan": torch.full((3,), float("nan"))}
    a = Checkpoint.open(save_folder(tmp_path / "a", {SINGLE_FILE: tensors}))
    b = Checkpoint.open(save_folder(tmp_path / "b", {SINGLE_FILE: tensors}))
    assert same_bytes(a, b) == []
    for name, info in b.tensors.items():
        if info.nbytes:
            b.view(name).flatten().view(torch.uint8)[-1] ^= 1
    lines = same_bytes(a, b)
    assert {line.split(":")[0] for line in lines} == {name for name, info in a.tensors.items() if info.nbytes}
    assert "F8_E5M2.matrix: 1 of 6 elements differ, first at [1, 2]: 5.0 != 4.0" in lines
    assert any(line.startswith("I64.scalar: 1 of 1 elements differ, first at []: ") for line in lines)


def test_tensor_info_is_a_value(tmp_path):
    """TensorInfo cannot be changed and compares by value, so a plan can be compared with what is on disk."""
    with Checkpoint.open(save_one(tmp_path / "x")) as checkpoint:
        info = checkpoint.tensors["a"]
        assert info == dataclasses.replace(info)
        with pytest.raises(dataclasses.FrozenInstanceError):
            info.offset = 0
