"""Folders as they are: bad files among good ones, hardly any files, no room left on the disk.

What can be decoded is decoded rightly; what cannot is listed, counted and named; nothing ends in a traceback.
"""

import csv
import errno
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

import cv2
import numpy as np
import pytest
from PIL import Image

import imatch
from imatch.core import compute, settings
from imatch.core.files import read_json, read_rows, write_signed
from imatch.core.step import open_step
from imatch.core.types import ImatchError, ImatchWarning, PhotographError, StepError
from imatch.data import images
from imatch.data.pairs import pair_path
from imatch.data.store import Stored
from imatch.features import base
from imatch.features.sift import Sift
from imatch.viz.html import sheet_page
from tests import grouped
from tests.grouped import by
from tests.test_images import STORED, orientation, png_of_zeros
from tests.test_resume import opened
from tests.test_steps import indexed, judged, without_times

NOBODY = 65534


def picture(seed, h=96, w=128):
    """(h, w, 3) uint8: blobs of several sizes, so that keypoints are found."""
    rng = np.random.default_rng(seed)
    layers = [rng.normal(0, 25, (h // cell, w // cell, 3)) for cell in (4, 8, 16, 32)]
    total = 128 + sum(cv2.resize(layer, (w, h), interpolation=cv2.INTER_CUBIC) for layer in layers)
    return np.clip(np.round(total), 0, 255).astype(np.uint8)


def write(folder, n, first=0):
    """n good JPEGs, 00.jpg, 01.jpg and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + n):
        Image.fromarray(picture(i)).save(folder / f"{i:02d}.jpg", quality=95)
    return folder


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def start(dataset, exports, **given):
    options = {"shard_size": 4, "on_change": "refuse", "resize": imatch.Resize(), **given}
    return grouped.start_embed(
        str(dataset),
        exports=str(exports),
        run="r",
        weight="sift",
        backbone_options={"max_keypoints": 50},
        tag="",
        **options,
    )


def embedded(dataset, exports, workers=0, shard_size=4, on_change="refuse", **given):
    """Start, embed and finish, as the notebook does."""
    step = start(dataset, exports, shard_size=shard_size, on_change=on_change)
    embeddings = imatch.steps.embed(step, resources=by(workers=workers), **given)
    return step, embeddings, imatch.steps.finish_embed(step, embeddings)


def skipped(step):
    """What skipped.jsonl lists: id -> reason."""
    return {row["id"]: row["skipped"] for row in read_rows(step.folder / "skipped.jsonl")}


def results(folder):
    """The bytes of everything that must come out the same, however often the run was stopped."""
    names = ["images.jsonl", "skipped.jsonl", "global.npy", *(f"local/{p.name}" for p in (folder / "local").iterdir())]
    return {name: (folder / name).read_bytes() for name in sorted(names)}


def same_tokens(a, b):
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("vector", "descriptors", "xy"))


# --- bad files among good ones ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A folder with one grey picture in every format, four ordinary photographs and what cannot be used."""
    folder = write(tmp_path_factory.mktemp("photographs") / "mixed", 4)
    colours = picture(100)
    grey = np.ascontiguousarray(colours[..., 0])
    upright = np.dstack([grey] * 3)
    image = Image.fromarray(grey)
    Image.fromarray(upright).save(folder / "plain.png")
    image.save(folder / "greyscale.png")
    image.convert("P").save(folder / "palette.png")
    image.convert("RGBA").save(folder / "rgba.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "sixteen bits.png")
    zero = Image.new("L", image.size)
    Image.merge("CMYK", (zero, zero, zero, Image.fromarray(255 - grey))).save(folder / "cmyk.tif")
    image.save(folder / "animated.gif", save_all=True, append_images=[Image.fromarray(255 - grey)])
    for value, turned in STORED.items():
        stored = np.ascontiguousarray(turned(upright))
        Image.fromarray(stored).save(folder / f"turned {value}.png", exif=orientation(value))
        stored = np.ascontiguousarray(turned(colours))
        Image.fromarray(stored).save(folder / f"turned {value}.jpg", exif=orientation(value), quality=95)
    (folder / "한글 폴더").mkdir()
    image.save(folder / "한글 폴더" / "비행 사진 1.png")
    (folder / "한글 폴더" / "up").symlink_to("..")

    (folder / "empty.jpg").write_bytes(b"")
    (folder / "letter.jpg").write_bytes(b"this is a letter, not a photograph\n" * 50)
    (folder / "loop.jpg").symlink_to("loop.jpg")
    Image.new("RGB", (1, 1), "red").save(folder / "one pixel.png")
    png_of_zeros(folder / "huge.png", 30_000)
    shutil.copy(folder / "00.jpg", folder / "한글 폴더" / "잘린 사진.jpg")
    truncate(folder / "한글 폴더" / "잘린 사진.jpg")
    return folder


REASONS = {
    "empty.jpg": "empty file",
    "letter.jpg": "not a photograph",
    "loop.jpg": "symbolic links",
    "one pixel.png": "nothing to describe",
    "huge.png": "too large to decode",
    "한글 폴더/잘린 사진.jpg": "truncated",
}
LOSSLESS = [
    "greyscale.png",
    "palette.png",
    "rgba.png",
    "sixteen bits.png",
    "cmyk.tif",
    "animated.gif",
    "한글 폴더/비행 사진 1.png",
    *(f"turned {value}.png" for value in STORED),
]


@pytest.fixture(scope="module", params=[0, 2], ids=["here", "workers"])
def run_of_mixed(request, mixed, tmp_path_factory):
    with pytest.warns(ImatchWarning) as said:
        ran = embedded(mixed, tmp_path_factory.mktemp("exports"), workers=request.param, max_skipped=0.5)
    return *ran, [str(warning.message) for warning in said]


def test_what_cannot_be_decoded_is_listed_with_its_reason(run_of_mixed):
    step, embeddings, _, _ = run_of_mixed
    listed = skipped(step)
    assert set(listed) == set(REASONS)
    for id, reason in REASONS.items():
        assert reason in listed[id]
        assert id not in embeddings.ids


def test_what_cannot_be_decoded_is_counted(run_of_mixed, mixed):
    step, embeddings, metrics, _ = run_of_mixed
    usable = 4 + 1 + len(LOSSLESS) + 8
    assert metrics["skipped"] == len(REASONS)
    assert metrics["photographs"] == len(embeddings) == usable
    assert step.metrics == metrics
    files = {p.relative_to(mixed).as_posix() for p in mixed.rglob("*.*")}
    assert {*embeddings.ids, *REASONS} == files


def test_what_cannot_be_decoded_is_named_in_one_warning(run_of_mixed):
    *_, said = run_of_mixed
    assert len(said) == 1
    assert f"{len(REASONS)} of {4 + 1 + len(LOSSLESS) + 8 + len(REASONS)} photographs were skipped" in said[0]
    for id, reason in REASONS.items():
        assert any(id in line and reason in line for line in said[0].splitlines())


@pytest.mark.parametrize("id", LOSSLESS)
def test_every_format_gives_the_tokens_of_the_plain_picture(run_of_mixed, id):
    _, embeddings, _, _ = run_of_mixed
    row = embeddings.ids.index(id)
    plain = embeddings.tokens(embeddings.ids.index("plain.png"))
    assert embeddings.rows[row]["size"] == [96, 128]
    assert len(plain.descriptors) > 10
    assert same_tokens(embeddings.tokens(row), plain)


@pytest.mark.parametrize("value", STORED)
def test_a_turned_jpeg_is_upright(run_of_mixed, value):
    _, embeddings, _, _ = run_of_mixed
    row, first = (embeddings.ids.index(f"turned {v}.jpg") for v in (value, 1))
    assert embeddings.rows[row]["size"] == [96, 128]
    # the blocks of the JPEGs differ, so a few keypoints do too
    assert embeddings.vectors[row] @ embeddings.vectors[first] > 0.5


@pytest.mark.parametrize("value", STORED)
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_positions_lie_on_the_upright_photograph(tmp_path, value, suffix):
    (tmp_path / "data").mkdir()
    upright = picture(100)
    Image.fromarray(upright).save(tmp_path / "data" / "plain.png")
    stored = np.ascontiguousarray(STORED[value](upright))
    Image.fromarray(stored).save(tmp_path / "data" / f"turned{suffix}", exif=orientation(value))
    resize = imatch.Resize("scale", scale=0.5)
    embeddings = imatch.steps.embed(
        start(tmp_path / "data", tmp_path / "exports", resize=resize), resources=by(workers=0)
    )
    plain, turned = (embeddings.tokens(row) for row in (0, 1))
    # a picture that is turned after it was made smaller differs by rounding, so a few keypoints do too
    near = np.linalg.norm(plain.xy[:, None] - turned.xy[None], axis=2).min(axis=1) < 0.5
    assert near.mean() > 0.8
    assert 96 < turned.xy[:, 0].max() < 128
    assert 48 < turned.xy[:, 1].max() < 96


def test_bad_files_change_nothing_in_the_good_ones(run_of_mixed, tmp_path):
    _, embeddings, _, _ = run_of_mixed
    _, alone, _ = embedded(write(tmp_path / "good", 4), tmp_path / "exports")
    for row, id in enumerate(alone.ids):
        assert same_tokens(embeddings.tokens(embeddings.ids.index(id)), alone.tokens(row))


def test_a_second_run_says_it_again_and_changes_nothing(mixed, tmp_path):
    with pytest.warns(ImatchWarning, match="6 of 34 photographs were skipped"):
        step, _, _ = embedded(mixed, tmp_path, max_skipped=0.5)
    before = results(step.folder)
    with pytest.warns(ImatchWarning, match="6 of 34 photographs were skipped"):
        again, _, metrics = embedded(mixed, tmp_path, max_skipped=0.5)
    assert again.folder == step.folder
    assert metrics["skipped"] == 6
    assert results(step.folder) == before


def test_a_warning_names_ten_and_says_where_the_others_are(tmp_path):
    folder = write(tmp_path / "data", 2)
    for i in range(13):
        (folder / f"bad {i:02d}.jpg").write_bytes(b"")
    with pytest.warns(ImatchWarning, match="13 of 15 photographs were skipped") as said:
        step, _, _ = embedded(folder, tmp_path / "exports", max_skipped=1.0)
    text = str(said[0].message)
    assert "bad 09.jpg" in text
    assert "bad 10.jpg" not in text
    assert f"and 3 more in {step.folder / 'skipped.jsonl'}" in text


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_assumed_of_numbers_is_told_and_kept(tmp_path, workers):
    folder = write(tmp_path / "data", 2)
    grey = picture(5)[..., 0].astype(np.uint16)
    Image.fromarray(grey * 16).save(folder / "twelve bits.png")
    Image.fromarray(np.full_like(grey, 4080)).save(folder / "flat.png")
    with pytest.warns(ImatchWarning) as said:
        _, embeddings, _ = embedded(folder, tmp_path / "exports", workers)
    reason, assumed = (str(warning.message) for warning in said)
    why = "of 65,535: taken as 12 bits"
    assert (
        f"flat.png: nothing to describe: no texture was found in its 128 x 96 pixels: values reach 4,080 {why}"
        in reason
    )
    assert assumed.startswith("assumed of the pixels of 1 photographs (values reach ")
    assert assumed.endswith(f"{why}): twelve bits.png")
    assert [id for id, row in zip(embeddings.ids, embeddings.rows, strict=True) if "note" in row] == ["twelve bits.png"]
    with pytest.warns(ImatchWarning, match="assumed of the pixels of 1 photographs"):
        imatch.embed([folder / "00.jpg", folder / "twelve bits.png"], "sift")


# --- a file that may not be read --------------------------------------------------------------------------


@contextmanager
def as_nobody():
    """Without root's right to read everything."""
    if os.geteuid() != 0:
        yield
        return
    try:
        os.seteuid(NOBODY)
    except PermissionError as error:
        pytest.skip(f"root may not become somebody else here: {error}")
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder():
    """A folder that everybody may enter and write to; pytest's own are the user's alone."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


@pytest.fixture
def unreadable(open_folder):
    """Four photographs, 02.jpg may not be read, and what the other three give."""
    folder = write(open_folder / "data", 4)
    (folder / "02.jpg").chmod(0)
    good = write(open_folder / "good", 4)
    (good / "02.jpg").unlink()
    _, alone, _ = embedded(good, open_folder / "root")  # and all that is imported late is imported now
    return folder, open_folder / "exports", alone


def test_an_unreadable_file_is_skipped(unreadable):
    folder, exports, alone = unreadable
    with as_nobody(), pytest.warns(ImatchWarning, match=r"1 of 4 photographs .*\n.*02\.jpg: Permission denied"):
        step, embeddings, metrics = embedded(folder, exports)
    assert skipped(step) == {"02.jpg": "Permission denied"}
    assert metrics["skipped"] == 1
    assert embeddings.ids == alone.ids
    assert all(same_tokens(embeddings.tokens(row), alone.tokens(row)) for row in range(3))


def test_an_unreadable_file_ends_the_run_if_asked(unreadable):
    folder, exports, _ = unreadable
    with as_nobody(), pytest.raises(PhotographError, match=r"02\.jpg: Permission denied"):
        embedded(folder, exports, on_error="stop")


def test_a_file_that_may_be_read_again_is_used(unreadable):
    folder, exports, _ = unreadable
    with as_nobody(), pytest.warns(ImatchWarning, match="Permission denied"):
        embedded(folder, exports)
    (folder / "02.jpg").chmod(0o644)  # its size and time of change stay as they were
    with as_nobody():
        with pytest.raises(StepError, match=r"changed: 02\.jpg"):
            embedded(folder, exports)
        _, embeddings, metrics = embedded(folder, exports, on_change="recompute")
    assert (len(embeddings), metrics["skipped"]) == (4, 0)


def test_an_unreadable_folder_is_named(open_folder):
    folder = write(open_folder / "data", 2)
    write(folder / "secret", 1)
    (folder / "secret").chmod(0)
    with as_nobody(), pytest.raises(ImatchError, match=r"data/secret cannot be listed: Permission denied"):
        embedded(folder, open_folder / "exports")


# --- on_error and the share of bad files ------------------------------------------------------------------


def test_on_error_is_skip_or_stop(tmp_path):
    step = start(write(tmp_path / "data", 1), tmp_path / "exports")
    with pytest.raises(ImatchError, match="on_error must be 'skip' or 'stop', got 'ignore'"):
        imatch.steps.embed(step, resources=by(workers=0), on_error="ignore")


def test_headers_are_checked_before_the_work_starts(tmp_path):
    folder = write(tmp_path / "data", 9)
    (folder / "zz.jpg").write_bytes(b"a letter")
    with pytest.raises(PhotographError, match=r"zz\.jpg: not a photograph"):
        embedded(folder, tmp_path / "exports", shard_size=2, on_error="stop")
    assert list(tmp_path.glob("exports/**/*.npy")) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_stop_ends_at_the_first_and_keeps_what_was_finished(tmp_path, workers):
    folder = write(tmp_path / "data", 10)
    whole, _, _ = embedded(folder, tmp_path / "whole", shard_size=2)
    good = {name: (folder / name).read_bytes() for name in ("05.jpg", "08.jpg")}
    for name in good:
        truncate(folder / name)
    with pytest.raises(PhotographError, match=r"^05\.jpg: .*truncated.*what was finished stays"):
        embedded(folder, tmp_path / "exports", workers, shard_size=2, on_error="stop")
    local = start(folder, tmp_path / "exports", shard_size=2).folder / "local"
    assert sorted(p.name for p in local.glob("*.jsonl")) == ["00000.jsonl", "00001.jsonl"]
    before = {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in local.glob("0000[01].npy")}
    assert len(before) == 2

    for name, data in good.items():
        (folder / name).write_bytes(data)
    step, embeddings, metrics = embedded(folder, tmp_path / "exports", workers, shard_size=2, on_error="stop")
    assert metrics["skipped"] == 0
    assert len(embeddings) == 10
    assert {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in before} == before
    assert results(step.folder) == results(whole.folder)


@pytest.fixture(scope="module")
def forty(tmp_path_factory):
    return write(tmp_path_factory.mktemp("photographs") / "forty", 40)


@pytest.fixture
def forty_with(forty, tmp_path):
    """A copy of forty photographs in which some are spoilt."""

    def spoil(how, names):
        folder = Path(shutil.copytree(forty, tmp_path / "data"))
        for name in names:
            how(folder / name)
        return folder

    return spoil


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("how", [empty, truncate])
def test_five_percent_are_skipped_by_default(forty_with, tmp_path, how):
    folder = forty_with(how, ["03.jpg", "20.jpg"])
    with pytest.warns(ImatchWarning, match="2 of 40 photographs were skipped"):
        step, embeddings, metrics = embedded(folder, tmp_path / "exports")
    assert sorted(skipped(step)) == ["03.jpg", "20.jpg"]
    assert (len(embeddings), metrics["skipped"]) == (38, 2)


def test_past_five_percent_bad_headers_stop_the_run_before_it_works(forty_with, tmp_path):
    folder = forty_with(empty, ["03.jpg", "20.jpg", "39.jpg"])
    with pytest.raises(ImatchError, match=r"3 of 40 photographs cannot be used, more than max_skipped = 5%") as error:
        embedded(folder, tmp_path / "exports")
    assert all(f"{name}: empty file" in str(error.value) for name in ("03.jpg", "20.jpg", "39.jpg"))
    assert list(tmp_path.glob("exports/**/*.npy")) == []


def test_past_five_percent_bad_pixels_stop_the_run_and_keep_what_was_finished(forty_with, tmp_path):
    folder = forty_with(truncate, ["03.jpg", "20.jpg", "33.jpg"])
    for _ in range(2):  # run again, it must not creep past what stopped it
        with pytest.raises(ImatchError, match=r"3 of 40 photographs cannot be used, more than max_skipped = 5%"):
            embedded(folder, tmp_path / "exports")
        local = start(folder, tmp_path / "exports").folder / "local"
        assert [p.stem for p in sorted(local.glob("*.jsonl"))] == [f"{i:05d}" for i in range(9)]
    with pytest.warns(ImatchWarning, match="3 of 40 photographs were skipped"):
        _, embeddings, metrics = embedded(folder, tmp_path / "exports", max_skipped=0.1)
    assert (len(embeddings), metrics["skipped"]) == (37, 3)


def test_what_was_mended_after_a_stop_is_used(forty_with, forty, tmp_path):
    folder = forty_with(truncate, ["03.jpg", "20.jpg", "33.jpg"])
    with pytest.raises(ImatchError, match="Mend or remove them"):
        embedded(folder, tmp_path / "exports")
    for name in ("03.jpg", "20.jpg", "33.jpg"):
        shutil.copy(forty / name, folder / name)
    step, embeddings, metrics = embedded(folder, tmp_path / "exports")
    assert (len(embeddings), metrics["skipped"]) == (40, 0)
    whole, _, _ = embedded(forty, tmp_path / "whole")
    assert results(step.folder) == results(whole.folder)


@pytest.mark.parametrize("how", [empty, truncate])
def test_a_single_bad_file_never_stops_a_run(tmp_path, how):
    folder = write(tmp_path / "data", 2)
    how(folder / "00.jpg")
    with pytest.warns(ImatchWarning, match=r"1 of 2 photographs were skipped:\n  00\.jpg: "):
        _, embeddings, metrics = embedded(folder, tmp_path / "exports")
    assert embeddings.ids == ["01.jpg"]
    assert metrics["skipped"] == 1


@pytest.mark.parametrize("how", [empty, truncate])
def test_nothing_but_bad_files_is_said(tmp_path, how):
    folder = write(tmp_path / "data", 3)
    for path in folder.iterdir():
        how(path)
    with pytest.raises(ImatchError, match=r"none of the 3 photographs in .* could be used, the first: 00\.jpg: "):
        embedded(folder, tmp_path / "exports", max_skipped=1.0)


# --- no fault of the photographs --------------------------------------------------------------------------


def failing(monkeypatch, name, error, times=10**9):
    """Let the next reads of photographs so named fail."""
    left, read = itertools.count(1), Path.read_bytes

    def failed(path):
        if path.name in name and next(left) <= times:
            raise error
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failed)


def test_a_photograph_too_large_for_the_memory_is_named_and_taken_where_there_is_more(tmp_path, monkeypatch, capsys):
    folder = write(tmp_path / "data", 5)
    Image.fromarray(picture(9, 480, 640)).save(folder / "zz.jpg")
    whole, _, _ = embedded(folder, tmp_path / "whole")
    with monkeypatch.context() as small:
        small.setattr(compute, "free_memory", lambda _="cpu": 2**26)
        why = "0 megapixels need 0.1 GB of 0.1 GB of memory: set resize.limit 500 or less, or use a machine with more"
        with pytest.raises(PhotographError, match=f"zz.jpg: {why}"):
            embedded(folder, tmp_path / "stopped", on_error="stop")
        capsys.readouterr()
        for _ in range(2):
            with pytest.warns(ImatchWarning, match=f"1 of 6 photographs were skipped:\n  zz.jpg: {why}"):
                step, _, metrics = embedded(folder, tmp_path / "exports", on_error="skip")
            assert skipped(step) == {"zz.jpg": why}
            assert (metrics["photographs"], metrics["skipped"]) == (5, 1)
        assert re.search(f"01_embed: zz.jpg is left out: {why}\n.*embed: +0%", capsys.readouterr().out)
        lacking = step.fingerprint
    step, _, metrics = embedded(folder, tmp_path / "exports")
    assert (metrics["photographs"], metrics["skipped"]) == (6, 0)
    assert step.fingerprint == whole.fingerprint != lacking
    assert results(step.folder) == results(whole.folder)
    with monkeypatch.context() as small:  # and is not taken away again where there is less
        small.setattr(compute, "free_memory", lambda _="cpu": 2**26)
        assert embedded(folder, tmp_path / "exports")[2]["skipped"] == 0


def test_as_many_photographs_are_in_work_as_there_is_memory_for(tmp_path, monkeypatch):
    """Decoded, in a batch, and as processes; and one where there is none."""
    folder, decode, describe = write(tmp_path / "data", 9), images.decode, Sift.__call__
    each = base.needed((96, 128), imatch.Resize(), Sift())["cpu"]
    now, lock, seen = [], Lock(), []

    def counted(*given):
        with lock:
            now.append(0)
            seen.append(len(now))
        time.sleep(0.01)
        try:
            return decode(*given)
        finally:
            now.pop()

    class Machines:
        shard = ""

        def __call__(self, work, jobs, devices):
            seen.append(len(devices))
            return compute.LOCAL(work, jobs, devices)

    monkeypatch.setattr(images, "decode", counted)
    monkeypatch.setattr(Sift, "__call__", lambda self, batch: seen.append(len(batch)) or describe(self, batch))
    monkeypatch.setattr(settings, "cores", lambda: 12)
    for fit, most in ((100, 8), (2.5, 2), (1, 1)):
        monkeypatch.setattr(compute, "free_memory", lambda _="cpu", fit=fit: int(fit * each * 8 / 7) + 1)
        seen.clear()
        step = start(folder, tmp_path / str(fit), shard_size=9)
        imatch.steps.embed(step, by(Machines(), workers=4))
        assert (max(seen), step.device.count("cpu")) == (most, min(most, 3))


PASSING = [OSError(number, os.strerror(number)) for number in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "error", [*PASSING, MemoryError()], ids=lambda error: error.strerror if error.args else "memory"
)
def test_passing_trouble_is_left_to_the_next_run(tmp_path, monkeypatch, error, workers):
    folder = write(tmp_path / "data", 6)
    whole, _, _ = embedded(folder, tmp_path / "whole", shard_size=2)
    with monkeypatch.context() as bad:
        failing(bad, ["02.jpg", "03.jpg"], error)
        for _ in range(2):
            with pytest.raises(
                ImatchError, match=r"2 of 6 photographs could not be read just now:\n  02\.jpg: "
            ) as said:
                embedded(folder, tmp_path / "exports", workers, shard_size=2)
        assert (error.strerror if error.args else "no memory was left") in str(said.value)
        assert "Run the same command again, it computes what is missing" in str(said.value)
    step = start(folder, tmp_path / "exports", shard_size=2)
    assert sorted(path.name for path in (step.folder / "local").glob("*.jsonl")) == ["00000.jsonl", "00002.jsonl"]
    with opened(folder) as read:
        step, _, metrics = embedded(folder, tmp_path / "exports", workers, shard_size=2)
    assert (read, metrics["skipped"]) == ({"02.jpg", "03.jpg"}, 0)
    assert results(step.folder) == results(whole.folder)


def test_exports_that_cannot_be_written_just_now_are_said(tmp_path, monkeypatch):
    folder = write(tmp_path / "data", 2)
    step = start(folder, tmp_path / "exports")

    def failed(*_):
        raise PASSING[0]

    with monkeypatch.context() as bad:
        bad.setattr(Path, "replace", failed)
        with pytest.raises(ImatchError, match=r"^01_embed could not go on \(.*run the same command again"):
            imatch.steps.embed(step, by(workers=0))
    assert embedded(folder, tmp_path / "exports")[2]["skipped"] == 0


def test_what_fails_once_is_read_once_more(tmp_path, monkeypatch):
    folder = write(tmp_path / "data", 4)
    failing(monkeypatch, ["01.jpg"], PASSING[0], times=1)
    assert embedded(folder, tmp_path / "exports")[2]["skipped"] == 0


def test_a_header_that_cannot_be_read_just_now_is_no_bad_header(tmp_path, monkeypatch):
    folder, look, left = write(tmp_path / "data", 4), Image.open, itertools.count(1)
    whole, _, _ = embedded(folder, tmp_path / "whole")

    def failed(file, *given, **named):
        if file == folder / "01.jpg" and next(left) == 1:
            raise PASSING[0]
        return look(file, *given, **named)

    monkeypatch.setattr(Image, "open", failed)
    step, _, metrics = embedded(folder, tmp_path / "exports")
    assert metrics["skipped"] == 0
    assert results(step.folder) == results(whole.folder)


@pytest.mark.parametrize("how", ["gone", "empty", "silent"])
def test_a_drive_that_drops_ends_the_run_in_one_line(tmp_path, monkeypatch, how):
    """Its folder is gone, or empty, or gives errors for each file: nothing is skipped for it."""
    folder, read = write(tmp_path / "data", 40), Path.read_bytes
    whole, _, _ = embedded(folder, tmp_path / "whole")

    def dropping(path):
        if how == "silent" and path.parent == folder and path.name > "10":
            raise PASSING[2]
        if path.name == "10.jpg" and folder.exists():
            folder.rename(tmp_path / "away")
            if how == "empty":
                folder.mkdir()
        return read(path)

    with monkeypatch.context() as dropped:
        dropped.setattr(Path, "read_bytes", dropping)
        gone = rf"^{folder} gives no photographs any more \(16 in a row, such as .*\): "
        with pytest.raises(ImatchError, match=gone):
            embedded(folder, tmp_path / "exports", max_skipped=1.0)
    if how != "silent":
        shutil.rmtree(folder, ignore_errors=True)
        (tmp_path / "away").rename(folder)
    step, _, metrics = embedded(folder, tmp_path / "exports")
    assert metrics["skipped"] == 0
    assert results(step.folder) == results(whole.folder)


def test_memory_that_runs_out_in_opencv_is_no_fault_of_the_photograph(tmp_path):
    """With a limit on the process that is not known beforehand."""
    folder = write(tmp_path / "data", 2)
    Image.fromarray(picture(9, 960, 1280)).save(folder / "zz.jpg")
    code = (
        "import imatch, psutil, resource\n"
        "from imatch.core import compute\n"
        "compute.free_memory = lambda _='cpu': 2**40\n"
        f"step = imatch.steps.start_embed({str(folder)!r}, run='r', storage=imatch.StorageOptions(shard_size=1))\n"
        "import numpy, imatch.features.sift\n"
        "numpy.ones((300, 300)) @ numpy.ones((300, 300))\n"
        "most = psutil.Process().memory_info().vms + 2**28\n"
        "resource.setrlimit(resource.RLIMIT_AS, (most, most))\n"
        "imatch.steps.embed(step, imatch.ComputeOptions(workers=0))\n"
    )
    environment = {**os.environ, "EXPORT_ROOT": str(tmp_path / "exports"), "OPENBLAS_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert "1 of 3 photographs could not be read just now:\n  zz.jpg: cpu had no memory left for" in ran.stderr
    assert len([*(tmp_path / "exports").rglob("*.xy.npy")]) == 2


# --- links ------------------------------------------------------------------------------------------------


def test_folders_that_link_in_a_circle_are_read_once(tmp_path):
    folder = write(tmp_path / "data", 2)
    write(folder / "sub", 1, first=2)
    (folder / "sub" / "parent").symlink_to("..")
    (folder / "sub" / "here").symlink_to(".")
    (folder / "nowhere").symlink_to("nowhere")
    _, embeddings, _ = embedded(folder, tmp_path / "exports")
    assert embeddings.ids == ["00.jpg", "01.jpg", "sub/02.jpg"]


def test_a_link_to_itself_is_skipped(tmp_path):
    folder = write(tmp_path / "data", 2)
    (folder / "loop.jpg").symlink_to("loop.jpg")
    with pytest.warns(ImatchWarning, match=r"loop\.jpg: .*symbolic links"):
        _, embeddings, metrics = embedded(folder, tmp_path / "exports")
    assert embeddings.ids == ["00.jpg", "01.jpg"]
    assert metrics["skipped"] == 1


# --- hardly any photographs -------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [[], ["notes.txt", ".hidden.jpg"]], ids=["empty", "no photographs"])
def test_a_folder_without_photographs(tmp_path, names):
    (tmp_path / "data").mkdir()
    for name in names:
        (tmp_path / "data" / name).write_bytes(b"text")
    with pytest.raises(ImatchError, match=rf"no photographs in {tmp_path}/data: none of its files ends in .*\.jpg"):
        embedded(tmp_path / "data", tmp_path / "exports")


def test_what_a_folder_holds_besides_is_said_first(tmp_path, capsys):
    write(tmp_path / "data" / "trip", 2)
    for name in ("@eaDir/00.jpg/SYNO_THUMB_M.jpg", "trip/00.DNG"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    step = start(tmp_path / "data", tmp_path / "exports")
    imatch.steps.preflight(step)
    said = "1 .dng (raw of a camera: develop it to TIFF or JPEG), 1 in @eaDir (thumbnails of a NAS)"
    _, line = capsys.readouterr().out.splitlines()
    assert line.startswith(f"photographs  2 in {tmp_path}/data, ")
    assert line.endswith(f" MB; left out: {said}")
    assert imatch.embed(tmp_path / "data", "dsift").ids == ["trip/00.jpg", "trip/01.jpg"]
    assert capsys.readouterr().err.endswith(f"; left out: {said}\n")


def test_a_folder_that_was_empty_is_used_when_photographs_came(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(ImatchError, match="no photographs in"):
        embedded(tmp_path / "data", tmp_path / "exports")
    _, embeddings, _ = embedded(write(tmp_path / "data", 1), tmp_path / "exports")
    assert embeddings.ids == ["00.jpg"]


def test_a_missing_folder(tmp_path):
    with pytest.raises(ImatchError, match=rf"dataset folder {tmp_path}/data does not exist: give an existing folder"):
        start(tmp_path / "data", tmp_path / "exports")
    assert not (tmp_path / "exports").exists()


def test_a_file_instead_of_a_folder(tmp_path):
    folder = write(tmp_path / "data", 1)
    with pytest.raises(ImatchError, match=r"00\.jpg is a file: give the folder"):
        start(folder / "00.jpg", tmp_path / "exports")


def test_no_dataset_at_all(tmp_path):
    with pytest.raises(ImatchError, match="no dataset given"):
        start("", tmp_path / "exports")


def neighbours(step, k=3):
    """The step's photographs searched among themselves: hits, twins, metrics and the finished 03_index."""
    index_step = indexed(step, None, "data-data", k=k)
    _, _, ranking, _, metrics = judged(index_step)
    return ranking, index_step.finish(metrics), index_step


def references_of(step):
    """The step's photographs as references, and the finished 02_references."""
    views = imatch.steps.start_references(
        str(step.folder),
        kind="isometric",
        angles=[0, 90],
        crops=[1.0],
        resize_to_original=False,
        file_type="jpg",
        quality=95,
        tag="",
        on_change="refuse",
    )
    imatch.steps.make_references(views, resources=by(workers=0))
    tokens = imatch.steps.start_reference_tokens(views)
    imatch.steps.finish_embed(tokens, imatch.steps.embed(tokens, resources=by(workers=0)))
    return tokens


def matched(index_step, outputs=("json", "npy", "png")):
    """The first neighbours of a 03_index matched 1:1: the rows of the pairs and the finished 04_match."""
    step = grouped.start_match(
        str(index_step.folder),
        candidates=1,
        matcher="mutual",
        matcher_options={},
        model="homography",
        threshold=0.0,
        confidence=0.9999,
        iterations=1000,
        min_inliers=8,
        min_share=0.0,
        outputs=outputs,
        tag="",
        on_change="refuse",
    )
    pairs = imatch.steps.match_pairs(step, resources=by(workers=0))
    step.finish(imatch.steps.match_metrics(step, pairs))
    return pairs, step


def test_one_photograph(tmp_path):
    step, embeddings, metrics = embedded(write(tmp_path / "data", 1), tmp_path / "exports")
    assert embeddings.ids == ["00.jpg"]
    assert (metrics["photographs"], metrics["skipped"]) == (1, 0)
    assert np.linalg.norm(embeddings.vectors[0]) == pytest.approx(1, abs=1e-5)
    assert len(Stored(references_of(step).folder)) == 2
    hits, metrics, _ = neighbours(step)
    assert (hits.rows == -1).all()
    assert (metrics["gallery"], metrics["without_answer"]) == (1, 1)


def test_two_photographs_with_equal_content(tmp_path):
    folder = write(tmp_path / "data", 1)
    shutil.copy(folder / "00.jpg", folder / "copy.jpg")
    step, embeddings, metrics = embedded(folder, tmp_path / "exports", shard_size=1)
    a, b = embeddings.rows
    assert (a["id"], b["id"], metrics["photographs"]) == ("00.jpg", "copy.jpg", 2)
    assert a["sha256"] == b["sha256"]
    assert same_tokens(embeddings.tokens(0), embeddings.tokens(1))
    assert len(Stored(references_of(step).folder)) == 4
    hits, metrics, index_step = neighbours(step)
    assert hits.rows.tolist() == [[1, -1, -1], [0, -1, -1]]
    assert hits.scores[:, 0] == pytest.approx(1, abs=1e-5)
    assert metrics["twins"] <= 1  # of two equal vectors an index may name either first

    pairs, _ = matched(index_step)
    assert [(row["query"], row["candidate"]) for row in pairs] == [("00.jpg", "copy.jpg"), ("copy.jpg", "00.jpg")]
    for row in pairs:
        assert row["verified"], row["reason"]
        assert np.array(row["matrix"]) / row["matrix"][2][2] == pytest.approx(np.eye(3), abs=1e-3)


def test_hard_names_go_through_every_step(tmp_path):
    """Korean ones; one of 250 bytes in a folder of 249; all in a data set whose own name is as long and has two lines;
    one that a spreadsheet would compute, and one that a browser would."""
    folder = write(tmp_path / f"부산\n{'사진' * 40}", 4)
    long = f"{'비' * 83}/{'x' * 150}{'비행' * 16}.jpg"
    names = ["<img src=x onerror=alert(1)>.jpg", "=1+2.jpg", long, "한글 폴더/비행 사진.jpg"]
    for path, name in zip(sorted(folder.glob("*.jpg")), names, strict=True):
        (folder / name).parent.mkdir(exist_ok=True)
        path.rename(folder / name)
    step, embeddings, _ = embedded(folder, tmp_path / "내보내기 1", shard_size=4)
    assert embeddings.ids == names
    references = Stored(references_of(step).folder)
    assert sorted({view["source"] for view in references.views.values()}) == names
    assert all((references.root / id).is_file() for id in references.ids)
    ranking, _, index_step = neighbours(step)
    sheet = sheet_page("<u>", embeddings, embeddings, ranking, tmp_path / "sheet.html").read_text(encoding="utf-8")
    assert not re.search("<(img|u>)", sheet)
    assert sheet.count("&lt;img src=x") >= 4  # as a query with its label, and as a hit
    with pytest.warns(ImatchWarning, match="2 photographs are not in .*such as '<img"):
        pairs, match_step = matched(index_step, outputs=["json", "png", "colmap"])
    assert [row["query"] for row in pairs] == names
    assert len(list(match_step.folder.rglob("*비행 사진*/00.png"))) == 1
    assert all(pair_path(match_step.folder, row).with_suffix(".json").is_file() for row in pairs)
    assert all((match_step.folder / "colmap" / "keypoints" / f"{names[i]}.txt").is_file() for i in (1, 2))
    with (index_step.folder / "hits.csv").open(newline="", encoding="utf-8") as file:
        assert {row["query"] for row in csv.DictReader(file)} == {f"'{names[1]}", names[0], *names[2:]}
    assert imatch.export_per_image(embeddings, ["global.npy"]) == 2 * len(names)
    assert max(len(path.name.encode()) for path in (tmp_path / "내보내기 1").rglob("*")) < 255


def test_a_step_json_from_elsewhere_leads_nowhere_else(tmp_path):
    step, _, _ = embedded(write(tmp_path / "data", 2), tmp_path / "exports")
    record = read_json(step.folder / "step.json", signed=True)
    about = {**record["about"], "dataset": "../../../up", "weight": "/tmp/x"}
    write_signed(step.folder / "step.json", {**record, "run": "../../../../../up", "about": about})
    there = neighbours(open_step(step.folder))[2].folder
    assert (tmp_path / "exports" / "r" / "03_index") in there.parents
    assert {path.name for path in tmp_path.iterdir()} == {"data", "exports"}


def test_names_that_differ_in_case_alone_do_not_overwrite_each_other(tmp_path):
    folder = write(tmp_path / "data", 2)
    (folder / "00.jpg").rename(folder / "01.JPG")
    step, _, _ = embedded(folder, tmp_path / "exports")
    _, _, index_step = neighbours(step)
    started = grouped.start_match(str(index_step.folder))
    (started.folder / "STEP.JSON").symlink_to("step.json")  # as on a disk of Windows, whose A is a
    with pytest.raises(ImatchError, match=r"^01.JPG and 01.jpg are one name on the disk of"):
        imatch.steps.match_pairs(started, resources=by(workers=0))
    (started.folder / "STEP.JSON").unlink()
    assert len(imatch.steps.match_pairs(started, resources=by(workers=0))) == 2


# --- no room left -----------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system for 2 MB and 300 files."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m,nr_inodes=300", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no small disk can be mounted here: {error}")
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def rooms(disk, what, step=1):
    """Fill a disk to its last page (or its last name), then give back a few at every turn."""
    filler = disk / "filler"
    if what == "pages":
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)):
                pass
        for size in range(filler.stat().st_size, -1, -4096 * step):
            os.truncate(filler, size)
            yield
    else:
        filler.mkdir()
        with suppress(OSError):
            for i in itertools.count():
                (filler / str(i)).touch()
        for path in sorted(filler.iterdir()):
            yield
            path.unlink()


def file_without_room(run):
    """The name of the file that there was no room for, as the message says it; None if the run came to its end."""
    try:
        run()
    except ImatchError as error:
        pattern = r"disk full while writing (.*) \(\d\.\d MB free\): what was finished stays valid; free some space .*"
        said = re.fullmatch(pattern, str(error))
        return Path(said[1]).name if said else pytest.fail(f"another problem: {error}")
    return None


def check_what_was_finished(folder, whole):
    """Shards that say they are whole have the bytes of a run on a disk with room."""
    assert list(folder.rglob("*.tmp")) == []
    finished = [path.stem for path in (folder / "local").glob("*.jsonl")]
    for stem in finished:
        for suffix in (".npy", ".xy.npy"):
            name = f"local/{stem}{suffix}"
            assert (folder / name).read_bytes() == whole[name]
    return len(finished)


@pytest.mark.parametrize("again", [True, False], ids=["goes on", "begins anew"])
@pytest.mark.parametrize("what", ["pages", "names"])
def test_a_full_disk_is_said_wherever_it_comes_and_ends_well_with_room(small_disk, tmp_path, what, again):
    folder = write(tmp_path / "data", 3)
    step, _, _ = embedded(folder, tmp_path / "exports", shard_size=1)
    whole = results(step.folder)
    exports = small_disk / "exports"
    folder_there = exports / step.folder.relative_to(tmp_path / "exports")
    full, kept = set(), set()
    for _ in rooms(small_disk, what):
        name = file_without_room(lambda: embedded(folder, exports, shard_size=1))
        if name is None:
            break
        full.add(name)
        kept.add(check_what_was_finished(folder_there, whole))
        if not again:
            shutil.rmtree(exports, ignore_errors=True)
    assert results(folder_there) == whole
    assert {"step.json", "00000.npy", "00002.xy.npy", "images.jsonl"} <= full  # it came at every stage
    assert kept == {0, 1, 2, 3}


def others(step, exports):
    """The bytes of everything below a step, but for the times in step.json and the paths in it."""
    return {
        path.relative_to(exports).as_posix(): without_times(path)
        for path in step.folder.rglob("*")
        if path.is_file() and path.name not in ("step.json", "seen.jsonl")
    }


OTHER_STEPS = {
    "02_references": lambda step: references_of(step),
    "03_index": lambda step: neighbours(step)[2],
    "04_match": lambda step: matched(neighbours(step)[2])[1],
}


@pytest.mark.parametrize("name", OTHER_STEPS)
def test_a_full_disk_is_said_by_the_other_steps(small_disk, tmp_path, name):
    folder, ran = write(tmp_path / "data", 2), []
    step, _, _ = embedded(folder, tmp_path / "exports")
    whole = others(OTHER_STEPS[name](step), tmp_path / "exports")
    step, _, _ = embedded(folder, small_disk / "exports")
    full = set()
    for _ in rooms(small_disk, "pages", step=2):
        said = file_without_room(lambda: ran.append(OTHER_STEPS[name](step)))
        if said is None:
            break
        full.add(said)
    assert len(full) >= 2
    assert others(ran[0], small_disk / "exports") == whole
