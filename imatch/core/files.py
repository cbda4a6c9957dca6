"""Write and read JSON, rows and arrays: every file goes to a temporary name, then is renamed."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import itertools
import json
import mmap
import os
import platform
import re
import secrets
import shutil
import sys
import time
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import psutil

from imatch.core import compute, settings
from imatch.core.config import NAME
from imatch.core.rows import Json
from imatch.core.types import ImatchError, ImatchWarning, StepError

if sys.platform != "win32":
    import fcntl

M = TypeVar("M", bound=Mapping[str, object])
RECOMPUTE = "run its notebook again with on_change recompute"
"""What mends a finished step that is damaged."""
LINES = 1000
"""How many rows are read at once: their keys are then held once for all of them, half of the memory."""
REMEDY = "delete its step's folder and run the notebook again"
"""What mends a file of a step that cannot be read."""


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it becomes `path`, whole and synced, when the block ends.

    Raises:
        ImatchError: the disk is full; nothing is left behind and what was finished stays valid.
    """
    # random, for other machines have the same process ids; of a long name the beginning, so that there is room for both
    temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say clearly that the disk is full when that is why something inside cannot write `path`.

    Raises:
        ImatchError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(next(folder for folder in path.parents if folder.is_dir())).free / 2**20
        raise ImatchError(
            f"disk full while writing {path} ({free:.1f} MB free): what was finished stays valid; free some space "
            "or choose another disk for exports, then run it again"
        ) from error


@contextmanager
def alone(folder: Path, part: str = "") -> Iterator[None]:
    """Let no other process work on a folder meanwhile: who is at work there is named, and waited for.

    The system ends what a killed process held. Within one process, and those that it forks, blocks may be nested.

    Args:
        folder: which is there.
        part: "i/n" of a work whose parts may be done at the same time, each once; "" is all of it.
    """
    with ExitStack() as held:
        if sys.platform != "win32":  # there, steps run in a container
            held.enter_context(_locked(folder / ".lock", fcntl.LOCK_SH if part else fcntl.LOCK_EX))
            if part:
                held.enter_context(_locked(folder / f".lock.{part.replace('/', '-')}", fcntl.LOCK_EX))
        yield


_held: set[Path] = set()
"""Locks of this process."""


@contextmanager
def _locked(path: Path, kind: int) -> Iterator[None]:
    file = None if path in _held else _lock(path, kind)
    if file is None:
        yield
        return
    _held.add(path)
    try:
        yield
    finally:
        _held.remove(path)
        with suppress(OSError):  # others share it, or their disk knows no locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        with suppress(OSError), file:
            fcntl.flock(file, fcntl.LOCK_UN)  # of forked processes, too


def _lock(path: Path, kind: int) -> IO[bytes] | None:
    """The open file that holds a lock; None where nothing can be written."""
    while True:
        try:
            with writing(path):
                file = path.open("ab+", buffering=0)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            return None
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            _say_who(file, path.parent)
            fcntl.flock(file, kind)
        except OSError as error:
            said = f"no locks on this disk ({error.strerror}): let no other run work on {path.parent} meanwhile"
            warnings.warn(said, ImatchWarning, stacklevel=2)
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            me, since = psutil.Process(), time.strftime("%F %T")
            with suppress(OSError):
                file.truncate(0)
                file.write(f"process {me.pid} of {me.username()} on {platform.node()}, since {since}".encode())
            return file
        file.close()  # who had it has removed it


def _say_who(file: IO[bytes], folder: Path) -> None:
    who = b""
    with suppress(OSError):  # a disk on which locked files cannot be read
        file.seek(0)
        who = file.read()
    print(
        f"{who.decode(errors='replace') or 'another process'} is at work in {folder}: waiting for its end. Interrupt "
        "this run, or that one (in JupyterLab, its kernel)",
        flush=True,
    )


def printable(id: str) -> str:
    """An id for people: bytes that are no text, and signs that move a terminal's cursor, become a question mark.

    >>> printable("caf\\udce9.jpg"), printable("a\\x1b[2J.jpg")
    ('caf\ufffd.jpg', 'a\ufffd[2J.jpg')
    """
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", "\ufffd", id)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file, atomically."""
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: object) -> None:
    """Write JSON that people can read, atomically. NaN is refused (ValueError): it is not JSON."""
    write_bytes(path, json_bytes(value))


def json_bytes(value: object) -> bytes:
    """What `write_json` writes."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode(errors="surrogateescape")


@contextmanager
def reading(path: Path, remedy: str = REMEDY) -> Iterator[None]:
    """Say in one line what is wrong with a file when something inside can make nothing of its bytes.

    Raises:
        StepError: it is not there, empty, zeros, cut short, or not what it should be. Trouble of the disk, or of
            memory, is not the file's and goes on as it came.

    >>> with reading(Path("none.json")):
    ...     read_json(Path("none.json"), "run 03_index again")
    Traceback (most recent call last):
    imatch.core.types.StepError: none.json cannot be read (it is not there): run 03_index again
    """
    try:
        yield
    except FileNotFoundError as error:
        raise StepError(f"{path} cannot be read (it is not there): {remedy}") from error
    except (OSError, MemoryError, ImatchError):
        raise
    except Exception as error:  # libraries say of damaged bytes whatever they stumble over
        raise StepError(f"{path} cannot be read ({_harm(path, error)}): {remedy}") from error


def _harm(path: Path, error: Exception) -> str:
    data = path.read_bytes()
    if not data.strip(b"\0"):
        return "it holds nothing but zeros" if data else "it is empty"
    if isinstance(error, json.JSONDecodeError):
        n = data.count(b"\n") + 1
        return f"line {error.lineno} is no JSON" if data.endswith(b"\n") else f"it ends in the middle of line {n}"
    if isinstance(error, KeyError):
        return f"it says no {error.args[0]}"
    return " ".join(str(error).split())[:200] or type(error).__name__


def read_json(path: Path, remedy: str = REMEDY, signed: bool = False) -> Any:
    """Read what `write_json` wrote; what is `signed` comes without its digest, of which earlier versions had none.

    Raises:
        StepError: as of `reading`; or a byte of what is signed is not what was written.
    """
    with reading(path, remedy):
        value = json.loads(path.read_bytes().decode(errors="surrogateescape"))
        if signed and (written := value.pop("digest", None)) and written != digest(value):
            raise ValueError("it is not what was written")
        return value


def write_signed(path: Path, record: Mapping[str, Json]) -> None:
    """Write a JSON object with its own digest, atomically.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_signed(Path(folder) / "a.json", {"k": 10})
    ...     read_json(Path(folder) / "a.json", signed=True)
    {'k': 10}
    """
    write_json(path, {**record, "digest": digest(record)})


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write JSON lines, one a row, atomically."""
    with atomic(path) as temporary, temporary.open("wb") as file:
        file.writelines(line(row) for row in rows)


def line(row: Mapping[str, object]) -> bytes:
    """One JSON line."""
    return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode(errors="surrogateescape")


def read_rows(path: Path, remedy: str = REMEDY) -> list[Any]:
    """Read JSON lines: rows of whatever kind the file is of (`core.rows`). Raises StepError as `reading` does."""
    rows: list[Any] = []
    with reading(path, remedy), path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        while lines := list(itertools.islice(file, LINES)):
            part = []
            with suppress(ValueError):
                part = json.loads(f"[{','.join(lines)}]")
            if len(part) != len(lines):  # one is torn; two torn ones may well make a whole one
                raise ValueError(f"line {len(rows) + _torn(lines)} is torn")
            rows += part
    return rows


def _torn(lines: Sequence[str]) -> int:
    """The number of the first that is no JSON, from 1."""
    for i, text in enumerate(lines, 1):
        try:
            json.loads(text)
        except ValueError:
            return i
    return len(lines)


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a `.npy`, atomically."""
    array = np.ascontiguousarray(array)
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data.cast("B") if array.size else b"")  # not tofile, which hides why it wrote too little


_COMPUTED = re.compile("'*[=+@\t\r\n\uff1d\uff0b\uff0d\uff20-]")
"""How text begins that a spreadsheet computes, with the marks before it; four of the signs are of full width, too."""


def csv_bytes(columns: Iterable[str], rows: Iterable[M]) -> bytes:
    """A CSV: a line of names, and a line a row, whose other keys are left out.

    Text that a spreadsheet would compute gets an apostrophe in front; numbers are numbers.

    >>> csv_bytes(["id", "x"], [{"id": "=1+2.jpg", "x": -1}])
    b"id,x\\n'=1+2.jpg,-1\\n"
    """
    text = _Lines(newline="")
    table = csv.DictWriter(text, list(columns), restval="", extrasaction="ignore", lineterminator="\r\n")
    table.writeheader()
    for row in rows:
        computed = {name: f"'{cell}" for name, cell in row.items() if isinstance(cell, str) and _COMPUTED.match(cell)}
        table.writerow({**row, **computed})
    return text.getvalue().encode(errors="surrogateescape")


class _Lines(io.StringIO):
    """Lines that end in a line feed alone; csv is told of both signs, for it quotes cells that hold one of those."""

    def write(self, text: str) -> int:
        return super().write(text.removesuffix("\r\n") + "\n")


def unmarked(cell: str) -> str:
    """A cell of a CSV without the apostrophe that `csv_bytes` put in front.

    >>> unmarked("'=1+2.jpg"), unmarked("'a.jpg")
    ('=1+2.jpg', "'a.jpg")
    """
    return cell[1:] if cell[:1] == "'" and _COMPUTED.match(cell) else cell


def read_array(path: Path, remedy: str = REMEDY) -> np.ndarray:
    """Open a `.npy` as a memory map, of just the bytes that it says. Raises StepError as `reading` does.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_array(Path(folder) / "a.npy", np.eye(2))
    ...     read_array(Path(folder) / "a.npy").tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    with reading(path, remedy):
        array: np.memmap[Any, Any] = np.load(path, mmap_mode="r")
        size = path.stat().st_size
        if size != array.offset + array.nbytes:
            raise ValueError(f"it has {size} bytes, not {array.offset + array.nbytes}")
        return array


def take(vectors: np.ndarray, rows: np.ndarray | slice) -> np.ndarray:
    """A copy of some rows; the pages that were read for it, of a memory map, are given back.

    >>> take(np.eye(2, dtype=np.float32), slice(1, 2)).tolist()
    [[0.0, 1.0]]
    """
    base: Any = getattr(vectors, "base", None)
    if not (isinstance(vectors, np.memmap) and vectors.nbytes > 2**26 and hasattr(base, "madvise")):
        return np.array(vectors[rows], np.float32)
    if isinstance(rows, slice):
        taken = np.array(vectors[rows], np.float32)
        base.madvise(mmap.MADV_DONTNEED)
        return taken
    taken = np.empty((len(rows), *vectors.shape[1:]), np.float32)
    for first in range(0, len(rows), 64):  # each row may bring a megabyte of the file around it
        taken[first : first + 64] = vectors[rows[first : first + 64]]
        base.madvise(mmap.MADV_DONTNEED)
    return taken


def relative(path: Path, start: Path) -> str:
    """`path` as seen from the folder `start`, with forward slashes, so that exports can be moved as a whole.

    On another drive than `start` (Windows) it stays absolute.
    """
    return Path(os.path.relpath(path, start) if path.drive == start.drive else path).as_posix()


def compare(before: object, now: object, name: str = "") -> list[str]:
    """The differences between two JSON values, a line each.

    >>> compare({"scale": 1.0, "run": {"k": 5}}, {"scale": 0.5, "run": {"k": 5}})
    ['scale: 1.0 -> 0.5']
    """
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        return [
            line
            for key in keys
            for line in compare(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
        ]
    return [] if before == now else [f"{name}: {json.dumps(before)} -> {json.dumps(now)}"]


def refuse_or_say(name: str, on_change: str, what: str, differences: Sequence[str]) -> None:
    """Print what a step finds made differently, and return, when it may recompute; raise StepError otherwise."""
    more = [f"... and {len(differences) - 20} more"] if len(differences) > 20 else []
    message = f"{name}: {what}:\n" + "\n".join(f"  {line}" for line in [*differences[:20], *more])
    if on_change == "refuse":
        raise StepError(
            f"{message}\nNothing was touched. To make it anew: set on_change to recompute. "
            "To keep both: set another tag, or begin another run."
        )
    print(f"{message}\n  so what depends on it is computed again")


def digest(value: object) -> str:
    """The SHA-256 of a JSON value, independent of the order of its keys.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def seal(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Size and SHA-256 of files of a folder, such as "3 ba7816bf8f...", by their names; for `damage`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_bytes(Path(folder) / "a.npy", b"abc")
    ...     sealed = seal(Path(folder), ["a.npy"])
    ...     write_bytes(Path(folder) / "a.npy", b"abd")
    ...     damage(Path(folder), sealed)
    {'a.npy': 'other bytes'}
    """

    def read(name: str) -> str:
        with (folder / name).open("rb") as file:
            return f"{os.fstat(file.fileno()).st_size} {hashlib.file_digest(file, 'sha256').hexdigest()}"

    names = list(names)
    found = compute.ahead(read, names, settings.cores(), 64)
    return dict(zip(names, compute.progress(found, "digests", len(names), delay=3), strict=True))


def damage(folder: Path, sealed: Mapping[str, str], again: bool = False) -> dict[str, str]:
    """What is wrong with files of a folder since `seal`: name -> reason.

    Sizes are looked at always; bytes once, and then when a file's times have changed.

    Args:
        folder, sealed: see `seal`.
        again: read all bytes once more.
    """
    stats = _stats(folder, sealed)
    harmed = dict.fromkeys(sealed.keys() - stats.keys(), "gone")
    for name, stat in stats.items():
        if f"{stat.st_size}" != (size := sealed[name].partition(" ")[0]):
            harmed[name] = f"{stat.st_size} bytes, were {size}"
    if again or not (harmed or _remembered(folder, sealed, stats)):
        now = seal(folder, sealed.keys() - harmed)
        harmed |= {name: "other bytes" for name, was in sealed.items() if now.get(name, was) != was}
        if not (again or harmed):
            remember(folder, sealed)
    return harmed


def damage_said(harmed: Mapping[str, str]) -> str:
    """The first of what `damage` found, and the remedy.

    >>> damage_said({"global.npy": "gone", "images.jsonl": "gone"})
    'global.npy (gone) and 1 more: run its notebook again with on_change recompute'
    """
    name, reason = next(iter(harmed.items()))
    more = f" and {len(harmed) - 1} more" if len(harmed) > 1 else ""
    return f"{printable(name)} ({reason}){more}: {RECOMPUTE}"


def remember(folder: Path, sealed: Mapping[str, str]) -> None:
    """Take it for known, in the cache folder, that files of a folder are those that were sealed."""
    with suppress(OSError, ImatchError):  # a home that cannot be written to: read once more next time
        write_bytes(*_memory(folder, sealed, _stats(folder, sealed)))


def _remembered(folder: Path, sealed: Mapping[str, str], stats: Mapping[str, os.stat_result]) -> bool:
    path, state = _memory(folder, sealed, stats)
    with suppress(OSError):  # not there yet
        return path.read_bytes() == state
    return False


def _stats(folder: Path, names: Iterable[str]) -> dict[str, os.stat_result]:
    found = {}
    for name in names:
        with suppress(FileNotFoundError):
            found[name] = Path(folder, name).stat()
    return found


def _memory(folder: Path, sealed: Mapping[str, str], stats: Mapping[str, os.stat_result]) -> tuple[Path, bytes]:
    """Where it is remembered, and what changes when one is written to, even by who sets its times back."""
    state = digest([[was, name, stats[name].st_mtime_ns, stats[name].st_ctime_ns] for name, was in sealed.items()])
    return settings.cache_folder() / "whole" / digest([str(folder.resolve()), len(sealed)]), state.encode()


def flat_name(id: str) -> str:
    """An id as one file name: another for every id, and never too long for a file system.

    >>> flat_name("flight 1/a.jpg"), flat_name("flight 1__a.jpg")
    ('flight 1__a.jpg', 'flight 1__a.jpg~66900298')
    """
    name = id.replace("/", "__")
    if any(twice in id for twice in ("__", "_/", "/_")):  # such as of a__b and a/b
        name += f"~{name_digest(id)[:8]}"
    return short_name(name)


def short_name(name: str, most: int = NAME, digits: int = 16) -> str:
    """A name without slashes or, where it has more than `most` bytes, its beginning and so many digits of its digest.

    16 digits are never those of two names; of 8, whoever asks for them has to look.

    >>> short_name("a.jpg"), short_name("\ube44" * 100, most=20)
    ('a.jpg', '\ube44~f46984c41b1332e7')
    """
    data = os.fsencode(name)
    if len(data) <= most:
        return name
    return f"{data[: most - digits - 1].decode(errors='ignore')}~{name_digest(name)[:digits]}"


def name_digest(name: str) -> str:
    """The SHA-256 of a name as it is on the disk.

    >>> name_digest("a.jpg")[:8]
    '509b0d46'
    """
    return hashlib.sha256(os.fsencode(name)).hexdigest()


def one_name(text: str) -> str:
    """Text from a file or from the disk as the name of one file or folder: what it would leave its folder by is gone.

    >>> one_name("flight 1"), one_name("../x")
    ('flight 1', '.._x~d6b96a97')
    """
    name = re.sub(r"[/\\\x00-\x1f\x7f]", "_", text)
    if name != text or not name.strip("."):
        name += f"~{name_digest(text)[:8]}"
    return short_name(name)


def check_apart(folder: Path, ids: Iterable[str]) -> None:
    """Refuse ids that the disk of a step's folder takes for one, as those of Windows and Macs do with A.jpg and a.jpg.

    >>> check_apart(Path("nowhere"), ["A.jpg", "a.jpg"])
    """
    seen: dict[str, str] = {}
    for id in ids if (folder / "STEP.JSON").exists() else ():
        if (other := seen.setdefault(unicodedata.normalize("NFC", id).lower(), id)) != id:
            raise ImatchError(
                f"{printable(other)} and {printable(id)} are one name on the disk of {folder}: rename one of the "
                "photographs, or choose another disk for exports"
            )
