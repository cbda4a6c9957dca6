"""Embeddings on disk: rows stay with their vectors, files are whole or absent."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from imatch.core.files import (
    alone,
    atomic,
    line,
    read_array,
    read_json,
    read_rows,
    relative,
    write_array,
    write_bytes,
    write_json,
    write_rows,
    write_signed,
)
from imatch.core.types import StepError, Tokens, grid_xy
from imatch.data import store
from imatch.data.shards import Shards
from imatch.data.store import Stored

SHARDS, SHARD, D = 4, 3, 8


def tokens(seed: int, grid: tuple[int, int] | None = None) -> Tokens:
    random = np.random.default_rng(seed)
    n = grid[0] * grid[1] if grid else 3 + seed % 4
    vector = random.normal(size=D).astype(np.float32)
    xy = random.uniform(0, 90, (n, 2)).astype(np.float32)
    return Tokens(vector, random.normal(size=(n, D)).astype(np.float16), xy, grid)


def write_shards(folder: Path, grid: tuple[int, int] | None = None) -> list[Tokens]:
    """Shards of photographs; those of the last but one shard are all skipped, and one of the first."""
    written = []
    for shard in range(SHARDS):
        rows, kept = [], []
        for i in range(shard * SHARD, (shard + 1) * SHARD):
            rows.append({"id": f"flight é/{i:02d}.jpg", "size": (64, 96), "sha256": f"{i:064x}", "position": None})
            if shard == SHARDS - 2 or i == 1:
                rows[-1] = {"id": rows[-1]["id"], "skipped": "empty file", "sha256": rows[-1]["sha256"]}
            else:
                kept.append(tokens(i, grid))
        Shards(folder).write(shard, rows, kept)
        written += kept
    return written


@pytest.fixture(params=[None, (2, 3)], ids=["keypoints", "grid"])
def grid(request) -> tuple[int, int] | None:
    return request.param


@pytest.fixture
def written(grid, tmp_path) -> list[Tokens]:
    return write_shards(tmp_path, grid)


@pytest.fixture
def merged(written, tmp_path) -> Path:
    """A whole store."""
    assert len(written) == 8
    Shards(tmp_path).merge()
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what was written is what is read ---------------------------------------------------------------------


def test_tokens_come_back(written, merged, grid):
    embeddings = Stored(merged)
    assert len(embeddings) == len(written)
    assert embeddings.ids == [f"flight é/{i:02d}.jpg" for i in (0, 2, 3, 4, 5, 9, 10, 11)]
    for row, one in enumerate(written):
        back = embeddings.tokens(row)
        assert np.array_equal(back.vector, one.vector)
        assert np.array_equal(back.descriptors, one.descriptors)
        assert np.array_equal(back.xy, one.xy)
        assert back.grid == grid
    skipped = read_rows(merged / "skipped.jsonl")
    assert [row["id"][-6:-4] for row in skipped] == ["01", "06", "07", "08"]
    assert str(embeddings).startswith("8 photographs, 4 skipped; global 8 numbers each; ")


def test_merge_and_split_are_inverse(written, tmp_path):
    """Split after merge gives back the parts, merge after split the whole, byte for byte."""
    parts = files(tmp_path)
    Shards(tmp_path).merge()
    whole = files(tmp_path)
    local = {name for name in parts if not name.endswith((".jsonl", ".global.npy"))}
    assert {*whole} == local | {"images.jsonl", "skipped.jsonl", "global.npy"}
    assert {name: whole[name] for name in local} == {name: parts[name] for name in local}
    assert np.array_equal(np.load(tmp_path / "global.npy"), np.stack([one.vector for one in written]))

    Shards(tmp_path).split()
    assert not Shards(tmp_path).merged
    again = files(tmp_path)
    assert {name: again[name] for name in parts} == parts
    Shards(tmp_path).merge()
    assert files(tmp_path) == whole


def test_two_writers_of_one_process_id_do_not_share_a_file(tmp_path, monkeypatch):
    """Containers on one disk number their processes alike."""
    monkeypatch.setattr("os.getpid", lambda: 7)
    path = tmp_path / "rows.jsonl"
    with atomic(path) as one, atomic(path) as other:
        one.write_bytes(b"one\n")
        other.write_bytes(b"other\n")
        assert one.read_bytes() == b"one\n"
    assert path.read_bytes() == b"one\n"  # the last that ended
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.usefixtures("written")
def test_shard_rows_are_the_same_before_and_after_merging(tmp_path):
    before = Shards(tmp_path).rows()
    Shards(tmp_path).merge()
    assert Shards(tmp_path).rows() == before
    assert [len(rows) for rows in before.values()] == [SHARD] * SHARDS


@pytest.mark.usefixtures("written")
def test_removed_shard_leaves_nothing(tmp_path):
    names = {*files(tmp_path)}
    Shards(tmp_path).remove(1)
    assert {*files(tmp_path)} == {name for name in names if not name.startswith("local/00001")}
    Shards(tmp_path).remove(1)


@pytest.mark.usefixtures("written")
def test_merging_refuses_vectors_that_are_missing(tmp_path):
    """Fewer vectors than rows in a part: nothing is marked as merged."""
    path = tmp_path / "local/00001.global.npy"
    write_array(path, np.load(path)[:-1])
    with pytest.raises(StepError, match="vectors and rows do not fit"):
        Shards(tmp_path).merge()
    assert not Shards(tmp_path).merged


# --- rows that do not belong to their arrays --------------------------------------------------------------


def refused(folder: Path, reason: str) -> None:
    with pytest.raises(StepError, match=reason) as error:
        Stored(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_rows_are_refused(seed, merged):
    rows = read_rows(merged / "images.jsonl")
    order = np.random.default_rng(seed).permutation(len(rows))
    write_rows(merged / "images.jsonl", [rows[i] for i in order])
    refused(merged, "does not follow the one before it|are not sorted and unique")


def test_swapped_shards_are_refused(merged):
    """Rows of whole shards in another order: every shard fits in itself, the vectors do not."""
    rows = read_rows(merged / "images.jsonl")
    write_rows(merged / "images.jsonl", sorted(rows, key=lambda row: -row["shard"]))
    refused(merged, "not sorted and unique")


def test_swapped_ids_are_refused(merged):
    rows = read_rows(merged / "images.jsonl")
    rows[0]["id"], rows[-1]["id"] = rows[-1]["id"], rows[0]["id"]
    write_rows(merged / "images.jsonl", rows)
    refused(merged, "not sorted and unique")


@pytest.mark.parametrize("row", [0, 3, 7])
def test_missing_row_is_refused(row, merged):
    rows = read_rows(merged / "images.jsonl")
    write_rows(merged / "images.jsonl", rows[:row] + rows[row + 1 :])
    refused(merged, "does not follow the one before it|8 vectors for 7 photographs")


@pytest.mark.parametrize("wanted", [7, 9])
def test_missing_or_surplus_vector_is_refused(wanted, merged):
    vectors = np.load(merged / "global.npy")
    write_array(merged / "global.npy", np.resize(vectors, (wanted, D)))
    refused(merged, f"{wanted} vectors for 8 photographs")


@pytest.mark.parametrize("more", [-1, 1])
def test_shard_with_missing_or_surplus_descriptors_is_refused(more, merged):
    path = merged / "local/00001.npy"
    descriptors = np.load(path)
    write_array(path, np.resize(descriptors, (len(descriptors) + more, D)))
    refused(merged, f"shard 1 holds {len(descriptors) + more} descriptors for {len(descriptors)}")


def test_shard_with_missing_positions_is_refused(tmp_path):
    write_shards(tmp_path)
    Shards(tmp_path).merge()
    path = tmp_path / "local/00003.xy.npy"
    xy = np.load(path)
    write_array(path, xy[:-1])
    refused(tmp_path, f"shard 3 holds {len(xy) - 1} positions for {len(xy)} descriptors")


@pytest.mark.parametrize("name", ["global.npy", "local/00000.npy", "local/00003.npy"])
@pytest.mark.parametrize("harm", ["gone", "cut short", "empty"])
def test_array_that_is_gone_or_cut_short_is_refused(name, harm, merged):
    path = merged / name
    if harm == "gone":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 1 if harm == "cut short" else 0)
    refused(merged, re.escape(f"{path} cannot be read") + r"(?s:.*) run the notebook again")


@pytest.mark.usefixtures("written")
def test_unmerged_shards_are_no_embeddings(tmp_path):
    refused(tmp_path, "no embeddings at .* it goes on where it stopped")
    refused(tmp_path / "nowhere", "no embeddings at")


# --- small files ------------------------------------------------------------------------------------------


def half_write(path: Path, error: BaseException) -> None:
    was = files(path.parent)
    with atomic(path) as temporary:
        temporary.write_bytes(b"half")
        assert files(path.parent) == {**was, temporary.name: b"half"}
        raise error


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt(), OSError(5, "Input/output error")], ids=repr)
def test_atomic_leaves_nothing_behind_on_an_exception(error, tmp_path):
    path = tmp_path / "new" / "file.bin"
    with pytest.raises(type(error)):
        half_write(path, error)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt(), OSError(5, "Input/output error")], ids=repr)
def test_atomic_keeps_the_old_file_on_an_exception(error, tmp_path):
    path = tmp_path / "file.bin"
    write_bytes(path, b"old")
    with pytest.raises(type(error)):
        half_write(path, error)
    assert files(tmp_path) == {"file.bin": b"old"}
    write_bytes(path, b"new")
    assert files(tmp_path) == {"file.bin": b"new"}


def test_atomic_passes_on_what_is_not_a_full_disk(tmp_path):
    with pytest.raises(FileNotFoundError), atomic(tmp_path / "file.bin"):
        pass  # nothing was written
    assert files(tmp_path) == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"rows": [1.0, -float("inf")]}])
def test_nan_is_no_json(value, tmp_path):
    path = tmp_path / "metrics.json"
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, value)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_rows(path, [{"fine": 1}, {"value": value}])
    assert files(tmp_path) == {}


def test_json_and_rows_come_back(tmp_path):
    """Names of any kind: other alphabets, line separators, and bytes that are no UTF-8 at all."""
    names = ["서울.jpg", "a\nb.jpg", "a\u2028b.jpg", os.fsdecode(b"\xff.jpg"), 'q"uote\\.jpg']
    rows = [{"id": name, "score": 0.1 + 0.2, "size": [1, 2]} for name in names]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows
    assert b"".join(map(line, rows)) == (tmp_path / "rows.jsonl").read_bytes()
    assert (tmp_path / "rows.jsonl").read_bytes().count(b"\n") == len(rows)
    write_json(tmp_path / "value.json", rows)
    assert read_json(tmp_path / "value.json") == rows
    assert json.loads((tmp_path / "value.json").read_text("utf-8", "surrogateescape")) == rows


WRITTEN = {
    read_json: lambda path: write_json(path, {"names": ["a", "b"]}),
    read_rows: lambda path: write_rows(path, [{"id": name} for name in "abc"]),
    read_array: lambda path: write_array(path, np.eye(9)),
}
HARM = {
    "empty": (lambda _: b"", "it is empty"),
    "zeros": (lambda data: bytes(len(data)), "it holds nothing but zeros"),
    "half": (lambda data: data[: len(data) // 2], r"in the middle of line \d|line 2 is torn|mmap length is greater"),
    "longer": (lambda data: data + b"{", r"in the middle of line \d|line 4 is torn|it has 777 bytes, not 776"),
}


@pytest.mark.parametrize("read", WRITTEN, ids=lambda read: read.__name__)
@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_file_is_said_in_one_line_with_its_remedy(read, harm, tmp_path):
    WRITTEN[read](path := tmp_path / "file")
    damaged, said = HARM[harm]
    path.write_bytes(damaged(path.read_bytes()))
    if (read, harm) == (read_rows, "empty"):
        assert read(path) == []  # as of nothing skipped: whoever plans rows counts them
        return
    with pytest.raises(StepError, match=rf"^{path} cannot be read \(.*({said}).*\): mend it$"):
        read(path, "mend it")
    path.unlink()
    with pytest.raises(StepError, match=r"\(it is not there\): delete its step's folder and run the notebook again"):
        read(path)


def test_two_torn_lines_are_not_one_row(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"id": 1}\n{"id": 2\n"n": 3}\n')
    with pytest.raises(StepError, match="line 2 is torn"):
        read_rows(tmp_path / "rows.jsonl")


def test_a_record_of_which_one_digit_changed_is_refused(tmp_path):
    write_signed(path := tmp_path / "step.json", {"k": 10})
    path.write_bytes(path.read_bytes().replace(b"10", b"11"))
    with pytest.raises(StepError, match="it is not what was written"):
        read_json(path, signed=True)


# --- who is at work ---------------------------------------------------------------------------------------


PARTS = [("", "", 1), ("0/2", "0/2", 1), ("0/2", "", 1), ("0/2", "1/2", 0)]


@pytest.mark.parametrize(("theirs", "mine", "waits"), PARTS)
def test_who_is_at_work_is_named_and_waited_for(theirs, mine, waits, tmp_path, capsys):
    """Parts are done together, each once; what a killed process held is free."""
    code = f"""
import pathlib, sys
from imatch.core.files import alone
with alone(pathlib.Path({str(tmp_path)!r}), {theirs!r}):
    print("in", flush=True)
    sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        assert other.stdout.readline() == "in\n"
        killer = threading.Timer(0.3, other.kill)
        killer.start()
        with alone(tmp_path, mine), alone(tmp_path, mine):
            said = capsys.readouterr().out
            assert said.count(f"process {other.pid} of ") == waits
            assert (f"is at work in {tmp_path}: waiting for its end" in said) == bool(waits)
            assert (other.poll() is None) == (not waits)
        killer.join()
    with alone(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] in ([], [".lock.0-2"])


def test_relative_is_relative_with_forward_slashes(tmp_path):
    assert relative(tmp_path / "a" / "b", tmp_path / "c" / "d") == "../../a/b"


def test_grid_positions_are_the_centres_of_patches():
    xy = grid_xy((2, 3), (32, 48))
    assert xy.dtype == np.float32
    assert xy.tolist() == [[7.5, 7.5], [23.5, 7.5], [39.5, 7.5], [7.5, 23.5], [23.5, 23.5], [39.5, 23.5]]


# --- whose vector a row holds -------------------------------------------------------------------------------


def test_every_row_knows_its_vector(merged, written):
    embeddings = Stored(merged)
    embeddings.check_rows()
    assert [row["vector"] for row in embeddings.rows] == [store.vector_digest(one.vector) for one in written]
    assert len({row["vector"] for row in embeddings.rows}) == len(written)


@pytest.mark.parametrize(
    "moved", [[1, 0, 2, 3, 4, 5, 6, 7], [7, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 7, 6]], ids=str
)
def test_rows_of_other_vectors_are_counted_and_the_first_is_named(merged, moved):
    ids = Stored(merged).ids
    np.save(merged / "global.npy", np.load(merged / "global.npy")[moved])
    wrong = [row for row, place in enumerate(moved) if row != place]
    said = f"{len(wrong)} of 8 rows .* the row of {ids[wrong[0]]} holds the vector of {ids[moved[wrong[0]]]}"
    with pytest.raises(StepError, match=said):
        Stored(merged).check_rows()


def test_one_bit_is_enough(merged):
    vectors = np.load(merged / "global.npy")
    vectors.view(np.uint32)[5, 3] ^= 1
    np.save(merged / "global.npy", vectors)
    with pytest.raises(StepError, match=r"1 of 8 rows .* holds a vector that no photograph of the list has"):
        Stored(merged).check_rows()


def test_vectors_know_their_rows_after_a_split(merged):
    before = read_rows(merged / "images.jsonl")
    Shards(merged).split()
    Shards(merged).merge()
    Stored(merged).check_rows()
    assert read_rows(merged / "images.jsonl") == before
