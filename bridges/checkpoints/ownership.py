"""One owner for each folder that is written: a journal in it, locked as long as its writer lives.

The journal names the files that the writer makes. Whoever finds it locked leaves the folder alone; whoever finds it unlocked
knows that the writer is dead, and which of the files are its leftovers.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from bridges.checkpoints.reader import CheckpointError

JOURNAL = ".goldengate.journal"


class Journal:
    """The journal of a folder, held by this process and by those that it forks. Raises CheckpointError where another run
    holds it; that of a dead one is an error too: `clear` comes first."""

    def __init__(self, folder: Path):
        self.path = folder / JOURNAL
        try:
            self._file = open(self.path, "x+")  # noqa: SIM115 - open as long as the folder is being written
        except FileExistsError:
            raise CheckpointError(_in_use(folder)) from None
        if not _lock(self._file.fileno()) or not self._is_in_place():
            self._file.close()
            raise CheckpointError(_in_use(folder))
        self.write(())

    def write(self, files: Iterable[str]) -> None:
        """Say, before they are made, which files (paths below the folder) this writer makes."""
        text = "\n".join([json.dumps({"pid": os.getpid()}), *map(json.dumps, files)])
        self._file.seek(0)
        self._file.truncate()
        self._file.write(text + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self, *, remove: bool = True) -> None:
        """Let go of the folder; the journal goes unless the folder's files stay unfinished."""
        if remove and not self._file.closed and self._is_in_place():
            self.path.unlink(missing_ok=True)
        self._file.close()

    def _is_in_place(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path))
        return False


def check_free(folder: Path) -> None:
    """Raise CheckpointError while another run writes into the folder."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), open(folder / JOURNAL) as file:
        if not _lock(file.fileno()):
            raise CheckpointError(_in_use(folder))


def is_leftover(folder: Path) -> bool:
    """Was the folder being written by a run that is dead? CheckpointError when that run lives."""
    check_free(folder)
    return (folder / JOURNAL).is_file()


def foreign(folder: Path) -> list[str]:
    """What is in the folder and was not left by a dead run; CheckpointError while a run lives."""
    if not folder.is_dir():
        return []
    left = set(_named(folder)) if is_leftover(folder) else set()
    parents = {str(parent) for name in left for parent in PurePosixPath(name).parents}
    return sorted(e.name for e in folder.iterdir() if e.name not in {*left, *parents})


def clear(folder: Path) -> None:
    """Remove what a dead run has left in the folder, which is only what its journal names."""
    if not folder.is_dir() or not is_leftover(folder):
        return
    for name in _named(folder):
        with contextlib.suppress(OSError):
            (folder / name).unlink()
        for parent in list(PurePosixPath(name).parents)[:-1]:
            with contextlib.suppress(OSError):  # somebody else's file is in it
                (folder / parent).rmdir()


def remove_leftover_folder(folder: Path) -> None:
    """Remove a whole folder of a dead run's own. CheckpointError when it is not one, or its run lives."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir() or not is_leftover(folder):
        raise CheckpointError(f"{folder} is in the way and was not made by goldengate: move it")
    shutil.rmtree(folder)


@contextlib.contextmanager
def own_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that this run alone has, and which becomes `target` unless something is raised; what a dead
    run has left of it is taken over."""
    part = target.with_name(partial_name(target.name))
    remove_leftover_folder(part)
    try:
        part.mkdir()
        journal = Journal(part)
    except FileExistsError:
        raise CheckpointError(f"{target} is being written by another run: wait for it, or choose another") from None
    try:
        yield part
        journal.close()
        try:
            part.rename(target)
        except OSError as error:
            raise CheckpointError(f"{target} appeared meanwhile ({error.strerror}): choose another folder") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        journal.close(remove=False)


def must_be_new(target: Path) -> None:
    """Raise CheckpointError unless `target` is, or can be made, an empty folder that nobody else writes; leftovers do not count."""
    check_free(target)
    if target.is_file() or (target.exists() and not target.is_dir()) or foreign(target):
        raise CheckpointError(f"{target} is not empty: empty it or choose another folder")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target.parent} is not a folder: make it before writing {target.name}")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise CheckpointError(f"{target} cannot be written: permission denied; choose another folder")


def scratch_folder(beside: Path | None) -> tuple[Path, Journal]:
    """A folder for this run, beside the source where an export of full size fits; those that dead runs left go first."""
    for left in beside.glob("goldengate-*") if beside else ():
        with contextlib.suppress(CheckpointError):  # a run's that lives, or not ours
            remove_leftover_folder(left)
    scratch = Path(tempfile.mkdtemp(prefix="goldengate-", dir=beside))
    return scratch, Journal(scratch)


def partial_name(name: str) -> str:
    """The temporary name of a file, beside the final one."""
    path = PurePosixPath(name)
    return str(path.with_name(f".{path.name}.partial"))


def _named(folder: Path) -> list[str]:
    """The files of a journal under temporary and final names, itself last; nothing that leads out of the folder."""
    try:
        names = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()[1:]]
    except (OSError, ValueError):  # killed while it wrote: nothing was made then
        names = []
    plain = [
        name
        for name in names
        if isinstance(name, str) and name and not name.startswith("/") and ".." not in PurePosixPath(name).parts
    ]
    return [*(twin for name in plain for twin in (partial_name(name), name)), JOURNAL]


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _in_use(folder: Path) -> str:
    pid = ""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError):
        pid = f" (process {json.loads((folder / JOURNAL).read_text().splitlines()[0])['pid']})"
    return f"{folder} is being written by another run{pid}: wait for it or choose another folder"
