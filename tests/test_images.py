"""Photographs of every kind, made here: what is decoded has the right pixels, size and position."""

import hashlib
import io
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from imatch.core.types import ImatchError, PhotographError
from imatch.data import exif, images
from imatch.data.images import Resize
from tests.leaves import dead_leaves

BRIGHTON = Path(__file__).resolve().parents[2] / "shared" / "data" / "brighton_beach"
LATITUDE, LONGITUDE = (46.0, 47.0, 24.0), (92.0, 5.0, 42.0)
DULUTH = {1: "N", 2: LATITUDE, 3: "W", 4: LONGITUDE}

# how the rows and columns of an upright picture lie in a file of each EXIF orientation
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


def smooth(h, w, seed=0):
    """(h, w, 3) uint8: soft coloured blobs, different at every corner."""
    small = np.random.default_rng(seed).integers(30, 226, (4, 5, 3), np.uint8)
    return cv2.resize(small, (w, h), interpolation=cv2.INTER_CUBIC)


def orientation(value):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = value
    return exif


def with_gps(path, gps, size=(40, 60)):
    written, exif = Image.Exif(), Image.Exif()
    written[ExifTags.IFD.GPSInfo] = gps
    exif.load(written.tobytes())  # TIFFs take only what was read
    Image.fromarray(smooth(*size)).save(path, exif=exif, quality=95)
    return path


def far(a, b):
    """The largest difference of two pictures."""
    assert a.shape == b.shape
    return np.abs(a.astype(int) - b.astype(int)).max()


def png_of_zeros(path, side):
    """A whole 1-bit PNG of side x side black pixels, packed row by row."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(1)
    rows = b"\0" * (1 + -(-side // 8))
    data = b"".join(packer.compress(rows) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


# --- orientation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", STORED)
@pytest.mark.parametrize(("suffix", "tolerance"), [(".png", 0), (".tif", 0), (".webp", 12), (".jpg", 12)])
def test_orientation_is_applied(tmp_path, value, suffix, tolerance):
    upright = smooth(48, 80)
    path = tmp_path / f"a{suffix}"
    Image.fromarray(np.ascontiguousarray(STORED[value](upright))).save(path, exif=orientation(value), quality=95)
    decoded = images.decode(path)
    assert decoded.size == (48, 80)
    assert far(decoded.pixels, upright) <= tolerance


@pytest.mark.parametrize("value", STORED)
def test_orientation_is_applied_to_what_is_resized(tmp_path, value):
    upright = smooth(96, 160)
    path = tmp_path / "a.jpg"
    Image.fromarray(np.ascontiguousarray(STORED[value](upright))).save(path, exif=orientation(value), quality=95)
    decoded = images.decode(path, Resize("long_side", long_side=32), patch=16)
    expected = np.asarray(Image.fromarray(upright).resize((32, 16), Image.Resampling.BICUBIC))
    assert decoded.size == (96, 160)
    assert far(decoded.pixels, expected) <= 6


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16"])
def test_orientation_is_applied_in_every_mode(tmp_path, mode):
    grey = smooth(48, 80)[..., :1]
    stored = np.ascontiguousarray(STORED[6](grey))[..., 0]
    image = Image.fromarray(stored.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(stored).convert(mode)
    image.save(tmp_path / "a.png", exif=orientation(6))
    assert far(images.decode(tmp_path / "a.png").pixels, grey.repeat(3, axis=2)) == 0


@pytest.mark.parametrize("value", [0, 9, 300])
def test_an_orientation_that_does_not_exist_is_none(tmp_path, value):
    picture = smooth(48, 80)
    Image.fromarray(picture).save(tmp_path / "a.png", exif=orientation(value))
    decoded = images.decode(tmp_path / "a.png", Resize("scale", scale=0.5))
    assert decoded.size == (48, 80)
    assert decoded.pixels.shape == (24, 40, 3)
    assert exif.orientation(tmp_path / "a.png") == 1


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0" + b"\xff" * 50,
        b"Exif\0\0",
        b"Exif\0\0II*\0\x08\0\0\0" + b"\xff" * 50,
        b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHI4s", 0x112, 2, 2, b"6\0\0\0") + b"\0\0\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x8825, 4, 1, 99999) + b"\0\0\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x8825, 4, 1, 8) + b"\0\0\0\0",
    ],
    ids=["noise", "nothing", "torn", "orientation is text", "GPS past the end", "GPS is itself"],
)
def test_broken_exif_does_not_cost_the_photograph(tmp_path, exif):
    picture = smooth(48, 80)
    Image.fromarray(picture).save(tmp_path / "a.jpg", exif=exif, quality=95)
    decoded = images.decode(tmp_path / "a.jpg")
    assert decoded.size == (48, 80)
    assert decoded.position is None
    assert far(decoded.pixels, picture) <= 12


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
@pytest.mark.parametrize("value", STORED)
def test_a_position_goes_back_to_the_stored_pixel(tmp_path, value, suffix):
    path, (x, y) = tmp_path / f"a{suffix}", (17, 5)
    upright = np.zeros((48, 80, 3), np.uint8)
    upright[y, x] = 255
    pixels = np.ascontiguousarray(STORED[value](upright))
    Image.fromarray(pixels).save(path, exif=orientation(value), lossless=True)
    decoded = images.decode(path)
    assert decoded.pixels[y, x].min() == 255
    ((x, y),) = exif.stored(np.array([(x, y)], np.float32), decoded.size, exif.orientation(path)).astype(int)
    assert np.argwhere(pixels[..., 0] == 255).tolist() == [[y, x]]


@pytest.mark.parametrize("data", [b"", b"no photograph", b"\x89PNG\r\n\x1a\n broken"])
def test_what_is_no_photograph_has_orientation_1(tmp_path, data):
    (tmp_path / "a.png").write_bytes(data)
    assert exif.orientation(tmp_path / "a.png") == exif.orientation(tmp_path / "gone.png") == 1


# --- colours ----------------------------------------------------------------------------------------------

GREY = smooth(40, 60)[..., 0]
COLOUR = smooth(40, 60, seed=1)
RAMP = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)


def test_greyscale(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    assert far(images.decode(tmp_path / "a.png").pixels, np.dstack([GREY] * 3)) == 0


def test_greyscale_jpeg(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.jpg", quality=95)
    assert far(images.decode(tmp_path / "a.jpg").pixels, np.dstack([GREY] * 3)) <= 8


def test_black_and_white(tmp_path):
    Image.fromarray(GREY > 128).save(tmp_path / "a.png")
    assert far(images.decode(tmp_path / "a.png").pixels, np.dstack([(GREY > 128) * 255] * 3)) == 0


def test_palette(tmp_path):
    image = Image.fromarray(COLOUR).quantize(32)
    image.save(tmp_path / "a.png")
    colours = np.array(image.getpalette()).reshape(-1, 3)
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.mode == "P"
    assert far(images.decode(tmp_path / "a.png").pixels, colours[np.asarray(image)]) == 0


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bits_are_scaled(tmp_path, suffix):
    Image.fromarray(RAMP).save(tmp_path / f"a{suffix}")
    pixels = images.decode(tmp_path / f"a{suffix}").pixels
    assert pixels.dtype == np.uint8
    assert far(pixels, np.dstack([np.round(RAMP * (255 / 65535))] * 3)) == 0


def test_16_bits_of_the_other_byte_order_are_scaled(tmp_path):
    Image.frombytes("I;16B", (64, 64), RAMP.astype(">u2").tobytes()).save(tmp_path / "a.tif")
    assert far(images.decode(tmp_path / "a.tif").pixels, np.dstack([np.round(RAMP * (255 / 65535))] * 3)) == 0


def test_16_bits_are_scaled_when_resized(tmp_path):
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "a.png")
    Image.fromarray(GREY).save(tmp_path / "8.png")
    found, expected = (images.decode(tmp_path / name, Resize("scale", scale=0.5)).pixels for name in ("a.png", "8.png"))
    assert far(found, expected) == 0


def test_16_bits_in_colour_are_scaled(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), (COLOUR.astype(np.uint16) * 257)[..., ::-1])
    assert far(images.decode(tmp_path / "a.png").pixels, COLOUR) <= 1


DEEP = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (48, 1))
"""A ramp from 0 to 252, (48, 64)."""


@pytest.mark.parametrize(
    ("numbers", "shown", "note"),
    [
        (DEEP.astype(np.uint16) * 16, DEEP, "values reach 4,032 of 65,535: taken as 12 bits"),
        (DEEP.astype(np.uint16) * 64, DEEP, "values reach 16,128 of 65,535: taken as 14 bits"),
        (DEEP.astype(np.int16) * 16, DEEP, "values reach 4,032 of 32,767: taken as 12 bits"),
        (DEEP.astype(np.int32), DEEP, "values reach 252 of 2,147,483,647: taken as 8 bits"),
        (DEEP.astype(np.uint32) * 16, DEEP, "values reach 4,032 of 4,294,967,295: taken as 12 bits"),
        (27300 + DEEP.astype(np.uint16), DEEP / 252 * 255, "values lie between 27,300 and 27,552: taken as"),
        (DEEP.astype(np.int16) - 100, DEEP / 252 * 255, "values lie between -100 and 152: taken as black and white"),
        ((DEEP.astype(int) - 128).astype(np.int8), DEEP / 252 * 255, "values lie between -128 and 124: taken as"),
        (DEEP.astype(np.int32) * 70000, DEEP / 252 * 255, "values lie between 0 and 17,640,000: taken as"),
        (DEEP.astype(np.float32) / 252, DEEP / 252 * 255, "values lie between 0 and 1: taken as black and white"),
        (DEEP.astype(np.float64), DEEP / 252 * 255, "values lie between 0 and 252: taken as black and white"),
        (DEEP.astype(np.uint16) * 257, DEEP, ""),
    ],
    ids=lambda value: str(value.dtype) if isinstance(value, np.ndarray) else "",
)
@pytest.mark.parametrize("bands", [1, 3])
def test_numbers_of_other_bits_are_scaled_and_it_is_noted(tmp_path, numbers, shown, note, bands):
    """By what the numbers reach, for colours and for grey alike; 16 bits in use are what they always were."""
    if bands == 3:
        numbers, shown = (np.dstack([part] * 2 + [part[:, ::-1]]) for part in (numbers, shown))
    tifffile.imwrite(tmp_path / "a.tif", numbers, photometric="rgb" if bands == 3 else "minisblack")
    decoded = images.decode(tmp_path / "a.tif")
    assert far(decoded.pixels, np.round(shown) if bands == 3 else np.dstack([np.round(shown)] * 3)) <= 1
    assert decoded.note.startswith(note)
    assert bool(decoded.note) == bool(note)


@pytest.mark.parametrize(("tag", "name"), [(341, "SMaxSampleValue"), (281, "MaxSampleValue")])
def test_the_white_that_a_tiff_names_is_taken(tmp_path, tag, name):
    numbers = DEEP.astype(np.uint16) * 80
    tifffile.imwrite(tmp_path / "a.tif", numbers, extratags=[(tag, 3, 1, 255 * 80, True)])
    decoded = images.decode(tmp_path / "a.tif")
    assert (far(decoded.pixels, np.dstack([DEEP] * 3)), decoded.note) == (0, ""), name


def packed_tiff(path, numbers, bits):
    """A TIFF of grey whose numbers are packed, so many bits each."""
    places = numbers.astype(int)[..., None] >> np.arange(bits - 1, -1, -1) & 1
    data = b"".join(np.packbits(row.ravel()).tobytes() for row in places)
    h, w = numbers.shape
    tags = ((256, w), (257, h), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, h), (279, len(data)))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    ends = struct.pack("<H", len(tags)) + entries + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data)) + data + ends)


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_packed_bits_are_scaled_by_bits_per_sample(tmp_path, bits):
    packed_tiff(tmp_path / "a.tif", DEEP.astype(int) << bits - 8, bits)
    decoded = images.decode(tmp_path / "a.tif")
    assert (far(decoded.pixels, np.dstack([DEEP] * 3)) <= 1, decoded.note) == (True, "")


def test_no_data_and_no_number_are_black(tmp_path):
    heights = np.where(DEEP < 100, np.float32(-9999), DEEP)
    heights[:, -1] = np.nan
    tifffile.imwrite(tmp_path / "a.tif", heights, extratags=[(42113, 2, 6, "-9999", True)])
    decoded = images.decode(tmp_path / "a.tif")
    assert decoded.note == "values lie between 100 and 248: taken as black and white"
    assert far(decoded.pixels[..., 0], np.round(np.clip((DEEP % 252) - 100.0, 0, None) / 148 * 255)) == 0
    tifffile.imwrite(tmp_path / "a.tif", np.full((20, 30), np.nan, np.float32))
    with pytest.raises(PhotographError, match="no pixel is a number"):
        images.decode(tmp_path / "a.tif")


@pytest.mark.parametrize("significant", [b"", bytes([12])], ids=["unsaid", "sBIT"])
@pytest.mark.parametrize("bands", [1, 3, 4])
def test_12_bits_in_a_png_are_scaled(tmp_path, significant, bands):
    """Pillow drops the lower half of colours, so these are read again."""
    numbers = DEEP.astype(np.uint16) * 16
    planes = [numbers, numbers[:, ::-1], numbers, np.full_like(numbers, 65535)][:bands]
    data = cv2.imencode(".png", np.dstack(planes))[1].tobytes()
    if significant:
        kind = b"sBIT" + significant * bands
        chunk = struct.pack(">I", bands) + kind + struct.pack(">I", zlib.crc32(kind))
        data = data[:33] + chunk + data[33:]
    (tmp_path / "a.png").write_bytes(data)
    decoded = images.decode(tmp_path / "a.png")
    assert far(decoded.pixels, np.dstack([DEEP, DEEP[:, ::-1] if bands > 1 else DEEP, DEEP])) <= 1
    assert decoded.note == ("" if significant else "values reach 4,032 of 65,535: taken as 12 bits")


PLANAR = np.ascontiguousarray(COLOUR.transpose(2, 0, 1))
WIDE = COLOUR.astype(np.uint16) * 257


@pytest.mark.parametrize(
    ("numbers", "options"),
    [
        (COLOUR, {}),
        (PLANAR, {"planarconfig": "separate"}),
        (PLANAR, {"planarconfig": "separate", "compression": "zlib"}),
        (WIDE, {"byteorder": ">"}),
        (WIDE, {"bigtiff": True}),
        (WIDE, {"tile": (16, 16), "compression": "zlib"}),
        (WIDE.transpose(2, 0, 1).copy(), {"planarconfig": "separate"}),
        (WIDE.transpose(2, 0, 1).copy(), {"planarconfig": "separate", "compression": "zlib"}),
        (WIDE.transpose(2, 0, 1).copy(), {"planarconfig": "separate", "tile": (16, 16), "byteorder": ">"}),
    ],
    ids=lambda value: "".join(f"{key} {one} " for key, one in value.items()) if isinstance(value, dict) else "",
)
def test_tiffs_of_every_layout_give_the_same_pixels(tmp_path, numbers, options):
    tifffile.imwrite(tmp_path / "a.tif", numbers, photometric="rgb", **options)
    assert images.check_header(tmp_path / "a.tif") == COLOUR.shape[:2]
    decoded = images.decode(tmp_path / "a.tif")
    assert (far(decoded.pixels, COLOUR), decoded.note) == (0, "")


@pytest.mark.parametrize("compression", [1, 5, 8])
def test_12_bits_in_colour_are_scaled_in_every_compression(tmp_path, compression):
    numbers = COLOUR.astype(np.uint16) * 16
    cv2.imwrite(str(tmp_path / "a.tif"), numbers[..., ::-1], [cv2.IMWRITE_TIFF_COMPRESSION, compression])
    decoded = images.decode(tmp_path / "a.tif")
    assert far(decoded.pixels, COLOUR) <= 1
    assert "taken as 12 bits" in decoded.note


@pytest.mark.parametrize("value", STORED)
def test_orientation_is_applied_to_numbers_of_16_bits(tmp_path, value):
    upright = smooth(48, 80)
    stored = np.ascontiguousarray(STORED[value](upright)).astype(np.uint16) * 257
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", extratags=[(274, 3, 1, value, True)])
    decoded = images.decode(tmp_path / "a.tif")
    assert (decoded.size, far(decoded.pixels, upright)) == ((48, 80), 0)
    assert images.check_header(tmp_path / "a.tif") == (48, 80)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_white_is_zero_where_a_tiff_says_so(tmp_path, dtype):
    top = np.iinfo(dtype).max
    tifffile.imwrite(tmp_path / "a.tif", (top - DEEP.astype(dtype) * (top // 255)).astype(dtype), photometric=0)
    assert far(images.decode(tmp_path / "a.tif").pixels, np.dstack([DEEP] * 3)) == 0


@pytest.mark.parametrize("first", [{"subfiletype": 1, "photometric": "rgb"}, {"subfiletype": 4, "photometric": 4}])
def test_a_preview_or_a_mask_is_not_the_photograph(tmp_path, first):
    small = COLOUR[::2, ::2].copy()
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(small if first["subfiletype"] == 1 else small[..., 0] > 100, **first)
        file.write(COLOUR, photometric="rgb")
    decoded = images.decode(tmp_path / "a.tif")
    assert (decoded.size, images.check_header(tmp_path / "a.tif")) == (COLOUR.shape[:2], COLOUR.shape[:2])
    assert far(decoded.pixels, COLOUR) == 0


BANDS = np.dstack([COLOUR, GREY])


@pytest.mark.parametrize("factor", [1, 257])
@pytest.mark.parametrize("kind", ["unspecified", "unassalpha", "assocalpha"])
@pytest.mark.parametrize("planar", [False, True])
def test_a_fourth_band_is_not_alpha(tmp_path, factor, kind, planar):
    """Near infrared, as software writes it: of no kind, or said to be alpha."""
    numbers = BANDS if factor == 1 else BANDS.astype(np.uint16) * factor
    layout = {"planarconfig": "separate"} if planar else {}
    numbers = np.ascontiguousarray(numbers.transpose(2, 0, 1)) if planar else numbers
    tifffile.imwrite(tmp_path / "a.tif", numbers, photometric="rgb", extrasamples=[kind], **layout)
    decoded = images.decode(tmp_path / "a.tif")
    assert far(decoded.pixels, COLOUR) == 0
    assert ("said to be alpha" in decoded.note) == (kind != "unspecified")


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_alpha_of_0_everywhere_is_the_reason(tmp_path, suffix):
    Image.fromarray(np.dstack([COLOUR, GREY * 0])).save(tmp_path / f"a{suffix}")
    with pytest.raises(PhotographError, match="alpha is 0 everywhere"):
        images.decode(tmp_path / f"a{suffix}")


@pytest.mark.parametrize(
    ("numbers", "options", "reason"),
    [
        (COLOUR, {"photometric": "cielab"}, "colours are CIELAB, PhotometricInterpretation 8"),
        (GREY, {"photometric": "cfa"}, "raw of a camera"),
        (COLOUR, {"photometric": 34892}, "raw of a camera"),
        (GREY.astype(np.complex64), {}, "SampleFormat 6"),
        (BANDS, {"photometric": "minisblack", "planarconfig": "contig"}, "4 bands, of MINISBLACK: which are red"),
        (COLOUR, {"photometric": "rgb", "subfiletype": 1}, "only a preview"),
    ],
    ids=["CIELab", "CFA", "LinearRaw", "complex", "four bands", "preview"],
)
def test_a_tiff_whose_numbers_are_no_colours_is_refused_by_name(tmp_path, numbers, options, reason):
    tifffile.imwrite(tmp_path / "a.tif", numbers, **options)
    for read in (images.check_header, images.decode):
        with pytest.raises(PhotographError, match=reason):
            read(tmp_path / "a.tif")


@pytest.mark.parametrize(("suffix", "tolerance"), [(".tif", 0), (".jpg", 4)])
@pytest.mark.parametrize(
    ("ink", "colour"),
    [
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 255, 0, 0), (255, 0, 255)),
        ((0, 0, 255, 0), (255, 255, 0)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((0, 0, 0, 0), (255, 255, 255)),
    ],
    ids=["cyan", "magenta", "yellow", "black", "paper"],
)
def test_cmyk(tmp_path, ink, colour, suffix, tolerance):
    Image.new("CMYK", (32, 24), ink).save(tmp_path / f"a{suffix}", quality=95)
    pixels = images.decode(tmp_path / f"a{suffix}").pixels
    assert far(pixels, np.full((24, 32, 3), colour)) <= tolerance


def test_transparent_pixels_lie_on_white(tmp_path):
    alpha = np.repeat(np.array([0, 51, 255], np.uint8), 20) * np.ones((40, 1), np.uint8)
    Image.fromarray(np.dstack([COLOUR, alpha])).save(tmp_path / "a.png")
    share = alpha[..., None] / 255
    assert far(images.decode(tmp_path / "a.png").pixels, np.round(COLOUR * share + 255 * (1 - share))) <= 1


def test_transparent_grey_lies_on_white(tmp_path):
    alpha = np.repeat(np.array([0, 255], np.uint8), 30) * np.ones((40, 1), np.uint8)
    Image.merge("LA", (Image.fromarray(GREY), Image.fromarray(alpha))).save(tmp_path / "a.png")
    assert far(images.decode(tmp_path / "a.png").pixels, np.dstack([np.where(alpha, GREY, 255)] * 3)) == 0


def test_a_transparent_colour_of_a_palette_lies_on_white(tmp_path):
    image = Image.new("P", (20, 10), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(0, (0, 0, 10, 10))
    image.save(tmp_path / "a.png", transparency=0)
    pixels = images.decode(tmp_path / "a.png").pixels
    assert pixels[5, 2].tolist() == [255, 255, 255]
    assert pixels[5, 15].tolist() == [200, 100, 50]


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "a.gif") as saved:
        assert saved.n_frames == 3
    assert far(images.decode(tmp_path / "a.gif").pixels, np.full((20, 30, 3), (255, 0, 0))) == 0


@pytest.mark.parametrize(("patch", "shape"), [(1, (1, 1, 3)), (16, (16, 16, 3))])
def test_one_pixel(tmp_path, patch, shape):
    Image.new("RGB", (1, 1), (10, 20, 30)).save(tmp_path / "a.png")
    decoded = images.decode(tmp_path / "a.png", Resize("scale", scale=0.25), patch)
    assert decoded.size == (1, 1)
    assert far(decoded.pixels, np.full(shape, (10, 20, 30))) == 0


# --- reduced decoding -------------------------------------------------------------------------------------


def centre_of_darkness(pixels):
    weight = 255.0 - pixels.mean(axis=2)
    weight[weight < 20] = 0  # what JPEG leaves in the white
    y, x = np.indices(weight.shape)
    return np.array([(x * weight).sum(), (y * weight).sum()]) / weight.sum()


@pytest.fixture(scope="module")
def blob(tmp_path_factory):
    """An odd-sized JPEG, white with a dark blob near the bottom right corner, and the blob's (x, y)."""
    h, w, centre = 1201, 1809, (1650.0, 1080.0)
    x = np.exp(-(((np.arange(w) - centre[0]) / 40) ** 2) / 2)
    y = np.exp(-(((np.arange(h) - centre[1]) / 40) ** 2) / 2)
    path = tmp_path_factory.mktemp("blob") / "blob.jpg"
    grey = np.round(255 - 255 * np.outer(y, x)).astype(np.uint8)
    Image.fromarray(np.dstack([grey] * 3)).save(path, quality=95)
    return path, np.array(centre)


@pytest.mark.parametrize(("scale", "reduced"), [(0.9, 1), (0.25, 2), (0.125, 4), (0.06, 8)])
def test_a_reduced_decode_does_not_shift(blob, scale, reduced):
    path, centre = blob
    decoded = images.decode(path, Resize("scale", scale=scale))
    h, w = decoded.pixels.shape[:2]
    with Image.open(path) as image:  # that it is a reduced decode at all
        image.draft(None, (2 * w, 2 * h))
        assert image.size == (-(-1809 // reduced), -(-1201 // reduced))
    assert decoded.size == (1201, 1809)
    expected = (centre + 0.5) * (w / 1809, h / 1201) - 0.5
    assert np.abs(centre_of_darkness(decoded.pixels) - expected).max() < 0.05


@pytest.mark.parametrize("scale", [0.25, 0.125, 0.06])
def test_a_reduced_decode_is_the_full_one_resized(tmp_path, scale):
    Image.fromarray(smooth(1201, 1809)).save(tmp_path / "a.jpg", quality=95)
    reduced = images.decode(tmp_path / "a.jpg", Resize("scale", scale=scale)).pixels
    full = Image.fromarray(images.decode(tmp_path / "a.jpg").pixels)
    resized = np.asarray(full.resize(reduced.shape[1::-1], Image.Resampling.BICUBIC))
    assert far(reduced, resized) <= 3
    shift, _ = cv2.phaseCorrelate(*(cv2.cvtColor(a, cv2.COLOR_RGB2GRAY).astype(np.float32) for a in (reduced, resized)))
    assert np.abs(shift).max() < 0.1


PEAK = """
import sys
from pathlib import Path
from imatch.features.base import create_backbone, embed_one

backbone = create_backbone(sys.argv[2])
embed_one(Path(sys.argv[1]), backbone, {"resize": {"limit": backbone.side}, "variant": "raw"})
# not ru_maxrss, which begins with the memory of the process that started this one
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_a_large_photograph_takes_little_memory(tmp_path):
    """2.5 GB at any size: sift's scale space of a square, which is the most; of the pixels, as many bytes for each of
    these 64 million as the largest that is accepted may take, and Python."""
    drawn = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 80, 4), np.uint8))
    drawn.resize((8000, 8000), Image.Resampling.NEAREST).save(tmp_path / "a.png", compress_level=1)
    pixels = 2.5e9 * 64e6 / images.MAX_PIXELS
    for weight, most in (("sift", 2.5e9), ("dsift", 0.15e9 + pixels)):
        command = [sys.executable, "-c", PEAK, str(tmp_path / "a.png"), weight]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert 1024 * int(done.stdout) < most, (weight, done.stdout)


# --- position ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gps", "latitude", "longitude", "altitude"),
    [
        (DULUTH, 46.79, -92.095, None),
        ({**DULUTH, 1: "S", 3: "E"}, -46.79, 92.095, None),
        ({**DULUTH, 5: b"\0", 6: 183.5}, 46.79, -92.095, 183.5),
        ({**DULUTH, 5: b"\1", 6: 12.5}, 46.79, -92.095, -12.5),
        ({1: "N", 2: (46.5, 0.0, 0.0), 3: "E", 4: (0.0, 30.0, 0.0)}, 46.5, 0.5, None),
    ],
    ids=["north west", "south east", "above the sea", "below the sea", "decimals"],
)
def test_position(tmp_path, gps, latitude, longitude, altitude):
    position = images.decode(with_gps(tmp_path / "a.jpg", gps)).position
    assert position["latitude"] == pytest.approx(latitude, abs=1e-9)
    assert position["longitude"] == pytest.approx(longitude, abs=1e-9)
    assert position["altitude"] == altitude


@pytest.mark.parametrize(
    ("changed", "doubt"),
    [
        ({2: None, 4: None}, ""),
        ({4: None}, "no longitude"),
        ({1: None, 3: None}, "latitude has no side, N or S"),
        ({1: "N", 3: ""}, "longitude has no side, E or W"),
        ({1: "W", 3: "N"}, "latitude has no side, N or S"),
        ({2: (460.0, 0.0, 0.0)}, "latitude is past 90: 460"),
        ({4: (180.0, 1.0, 0.0)}, "longitude is past 180: 180.017"),
        ({2: (46.0, 50.0, 75.0)}, "latitude is no angle: (46.0, 50.0, 75.0)"),
        ({2: (46.84, 50.0, 24.0)}, "latitude is no angle: (46.84, 50.0, 24.0)"),
        ({2: (0.0, 0.0, 0.0), 4: (0.0, 0.0, 0.0)}, "0 N 0 E, which is written where a receiver knows no place"),
    ],
)
def test_a_position_that_cannot_be_true_is_none_and_said_and_the_photograph_is_decoded(tmp_path, changed, doubt):
    gps = {tag: value for tag, value in {**DULUTH, **changed}.items() if value is not None}
    decoded = images.decode(with_gps(tmp_path / "a.jpg", gps))
    assert (decoded.position, decoded.doubt) == (None, doubt)
    assert far(decoded.pixels, smooth(40, 60)) <= 12


def header(gps, **camera):
    """EXIF as it is in memory, of a DJI."""
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "DJI\0\0"
    exif.get_ifd(ExifTags.IFD.GPSInfo).update(gps)
    exif.get_ifd(ExifTags.IFD.Exif).update({ExifTags.Base[name]: value for name, value in camera.items()})
    return exif


@pytest.mark.parametrize(
    "changed",
    [
        {1: "n", 3: "w"},
        {1: "North", 3: "West"},
        {1: "N\0", 3: " W"},
        {1: b"N\0", 3: b"W"},
        {2: 46.79, 4: 92.095},
        {2: (46.79, 0, 0), 4: (92.095,)},
        {2: (46, 47.4), 4: (92, 5.7, 0)},
        {2: (46, 46, 84 - 24), 4: (92, 5, 42)},
        {2: "46.79", 4: b"92.095\0"},
        {2: "46/1, 47/1, 24/1", 4: "92 5 42.0"},
    ],
    ids=str,
)
def test_a_position_is_taken_however_it_is_written(changed):
    position, doubt = exif.position(header({**DULUTH, **changed}), b"")
    wanted = 46 + 47 / 60 if changed.get(2) == (46, 46, 60) else 46.79
    assert (position["latitude"], position["longitude"], doubt) == (pytest.approx(wanted), pytest.approx(-92.095), "")


def test_an_altitude_that_cannot_be_true_is_said():
    position, doubt = exif.position(header({**DULUTH, 6: 4294967.295}), b"")
    assert (position["latitude"], position["altitude"]) == (pytest.approx(46.79), None)
    assert doubt == "altitude is none: 4,294,967 m"


MAKER_NOTE = {5: 0.5, 6: 1.75, 7: 46.0, 8: 3.0, 9: -89.5, 10: 42.25, 11: 0.0}


@pytest.mark.parametrize("endian", "<>")
def test_dji_says_in_its_own_note_how_the_camera_was_held(tmp_path, endian):
    """Little-endian, whatever the EXIF around it is, of which the note says nothing where it is cut off."""
    entries = b"".join(struct.pack("<HHIf", tag, 11, 1, value) for tag, value in MAKER_NOTE.items())
    for cut, wanted in ((0, (42.25, -89.5)), (30, (46.0, None)), (83, (None, None))):
        note = (struct.pack("<H", len(MAKER_NOTE)) + entries)[: len(entries) + 2 - cut]
        written = header(DULUTH, MakerNote=note)
        written.endian = endian
        Image.fromarray(smooth(40, 60)).save(tmp_path / "a.jpg", exif=written)
        assert (tmp_path / "a.jpg").read_bytes()[30:32] == {"<": b"II", ">": b"MM"}[endian]
        position = images.decode(tmp_path / "a.jpg").position
        assert (position.get("yaw"), position.get("pitch")) == wanted


@pytest.mark.parametrize(
    ("xmp", "held"),
    [
        ('<a d:GimbalYawDegree="-100.40" d:GimbalPitchDegree="-45.0" d:FlightYawDegree="+7"', (-100.4, -45, None)),
        (
            "<d:FlightYawDegree>+7.5</d:FlightYawDegree><d:RelativeAltitude>\n+30.25</d:RelativeAltitude>",
            (7.5, None, 30.25),
        ),
        ("<a Camera:Yaw='3700/100' Camera:Pitch='-90'", (37, -90, None)),
        ('<a p:CameraYawDegree="12.5" p:CameraPitchDegree="1"', (12.5, 1, None)),
        ('<s:CameraOrientationFLU s:Yaw="5"/><s:CameraOrientationNED s:Pitch="-89" s:Yaw="77"/>', (77, -89, None)),
        ('<a GimbalYawDegree="-170" GimbalPitchDegree="-90" GimbalRollDegree="180"', (10, -90, None)),
        ('<a GimbalYawDegree="nan" GimbalPitchDegree="inf" RelativeAltitude="high"', (123.5, None, None)),
        ("<" + "GimbalYawDegree" * 4000, (123.5, None, None)),
    ],
    ids=range(8),
)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_xmp_says_how_the_camera_was_held(tmp_path, xmp, held, suffix):
    path = with_gps(tmp_path / f"a{suffix}", {**DULUTH, 17: 123.5})
    with Image.open(path) as opened:
        written, pixels = opened.getexif(), opened.copy()
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp)
    if suffix == ".tif":
        written[ExifTags.Base.XMLPacket] = xmp.encode()
    pixels.save(path, exif=written, **({"pnginfo": info} if suffix == ".png" else {"xmp": xmp.encode()}))
    position = images.decode(path).position
    assert tuple(position.get(key) for key in ("yaw", "pitch", "relative_altitude")) == held


@pytest.mark.parametrize(
    ("xmp", "place"),
    [
        ('<a d:GpsLatitude="+46.79" d:GpsLongtitude="-92.095" d:AbsoluteAltitude="+198.5"', (46.79, -92.095, 198.5)),
        ("<e:GPSLatitude>46,47.4N</e:GPSLatitude><e:GPSLongitude>92,5,42W</e:GPSLongitude>", (46.79, -92.095, None)),
        ('<a GpsLatitude="0.000000" GpsLongitude="0.000000"', None),
        ('<a GPSLatitude="N" GPSLongitude="W"', None),
    ],
)
@pytest.mark.parametrize("gps", [{}, {1: "N", 2: (0, 0, 0), 3: "E", 4: (0, 0, 0)}], ids=["no EXIF", "no fix"])
def test_a_position_is_taken_from_xmp_where_exif_knows_none(gps, xmp, place):
    position, doubt = exif.position(header(gps), xmp.encode())
    assert (position and tuple(position.values())) == (place and pytest.approx(place))
    assert (doubt == "") == (place is not None)


def zero_by_zero(path, number):
    """Put 0/0, which cameras without a fix write, in the place of the rational number/1."""
    data, rational = path.read_bytes(), struct.pack(">2I", number, 1)
    assert data.count(rational) == 1
    path.write_bytes(data.replace(rational, bytes(8)))
    return path


def test_a_position_of_zero_by_zero_is_none(tmp_path):
    decoded = images.decode(zero_by_zero(with_gps(tmp_path / "a.jpg", DULUTH), 46))
    assert decoded.position is None
    assert decoded.doubt.startswith("latitude is no angle: (nan,")
    assert far(decoded.pixels, smooth(40, 60)) <= 12


def test_an_altitude_of_zero_by_zero_leaves_the_position(tmp_path):
    path = zero_by_zero(with_gps(tmp_path / "a.jpg", {**DULUTH, 6: 4711.0}), 4711)
    assert images.decode(path).position == {
        "latitude": pytest.approx(46.79),
        "longitude": pytest.approx(-92.095),
        "altitude": None,
    }


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_position_from_other_formats(tmp_path, suffix):
    position = images.decode(with_gps(tmp_path / f"a{suffix}", {**DULUTH, 6: 183.5})).position
    assert position["latitude"] == pytest.approx(46.79)
    assert position["altitude"] == 183.5


def test_a_photograph_without_exif_has_no_position(tmp_path):
    Image.fromarray(smooth(40, 60)).save(tmp_path / "a.jpg")
    assert images.decode(tmp_path / "a.jpg").position is None


def test_a_real_survey_lies_at_duluth():
    if not BRIGHTON.is_dir():
        pytest.skip(f"the drone survey is not at {BRIGHTON}")
    names = images.list_photographs(BRIGHTON)
    assert len(names) == 18
    for name in names:
        decoded = images.decode(BRIGHTON / name, Resize("scale", scale=0.1))
        assert decoded.size == (900, 1600)
        assert decoded.position["latitude"] == pytest.approx(46.84, abs=0.05)
        assert decoded.position["longitude"] == pytest.approx(-92.0, abs=0.05)
        assert 100 < decoded.position["altitude"] < 500


# --- what cannot be decoded -------------------------------------------------------------------------------


def jpeg_bytes():
    file = io.BytesIO()
    Image.fromarray(smooth(96, 128)).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"this is a letter, not a photograph\n" * 50, "not a photograph: no decoder knows its bytes"),
        (jpeg_bytes()[:300], ""),
    ],
    ids=["empty", "text", "header torn"],
)
def test_the_header_says_what_is_wrong(tmp_path, data, reason):
    (tmp_path / "a.jpg").write_bytes(data)
    for read in (images.check_header, images.decode):
        with pytest.raises(PhotographError) as error:
            read(tmp_path / "a.jpg")
        assert reason in str(error.value)
        assert str(error.value).strip()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("resize", [None, Resize("scale", scale=0.1)], ids=["full", "reduced"])
def test_a_truncated_jpeg_has_a_header_and_no_pixels(tmp_path, resize):
    data = jpeg_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) * 2 // 3])
    assert images.check_header(tmp_path / "a.jpg") == (96, 128)
    with pytest.raises(PhotographError, match="truncated"):
        images.decode(tmp_path / "a.jpg", resize)


def jpeg_of(mode, seed=0, **options):
    """A JPEG of 640 x 360 pixels in which much is to be seen."""
    rng = np.random.default_rng(seed)
    layers = [rng.normal(0, 25, (360 // cell, 640 // cell, 3)) for cell in (4, 8, 20, 40)]
    drawn = 128 + sum(cv2.resize(layer, (640, 360), interpolation=cv2.INTER_CUBIC) for layer in layers)
    file = io.BytesIO()
    Image.fromarray(np.clip(np.round(drawn), 0, 255).astype(np.uint8)).convert(mode).save(
        file, "JPEG", quality=92, **options
    )
    return file.getvalue()


KINDS = {
    "baseline": {"mode": "RGB"},
    "progressive": {"mode": "RGB", "progressive": True},
    "restart": {"mode": "RGB", "restart_marker_rows": 1},
    "grey": {"mode": "L"},
    "CMYK": {"mode": "CMYK"},
}


@pytest.fixture(scope="module", params=KINDS)
def two_jpegs(request):
    return jpeg_of(**KINDS[request.param]), jpeg_of(**KINDS[request.param], seed=1)


def test_a_damaged_jpeg_is_no_photograph(tmp_path, two_jpegs):
    """What libjpeg only warns of, and Pillow drops."""
    good, other = two_jpegs
    third, half = len(good) // 3, len(good) // 2
    damaged = {
        "zeros but for its end": good[:half] + bytes(len(good) - half - 2) + good[-2:],
        "zeros to its end": good[:half] + bytes(len(good) - half),
        "zeros inside": good[:third] + bytes(4096) + good[third + 4096 :],
        "another's half": good[:half] + other[half:],
        "cut": good[:half],
        "cut by three bytes": good[:-3],
    }
    for data in damaged.values():
        (tmp_path / "a.jpg").write_bytes(data)
        for resize in (None, Resize("scale", scale=0.2)):
            with pytest.raises(PhotographError, match=r"^damaged or truncated: .*([Pp]remature|extraneous)"):
                images.decode(tmp_path / "a.jpg", resize)


def test_what_follows_a_jpeg_costs_nothing_nor_does_its_end(tmp_path, two_jpegs):
    good, other = two_jpegs
    with Image.open(io.BytesIO(good)) as image:
        expected = np.asarray(image.convert("RGB"))
    for data in (good, good + bytes(1000), good + other, good + b"a trailer" * 50, good[:-2]):
        (tmp_path / "a.jpg").write_bytes(data)
        assert far(images.decode(tmp_path / "a.jpg").pixels, expected) == 0


@pytest.mark.parametrize("share", [5, 4, 3])
def test_a_flipped_byte_that_shifts_the_colours_is_found(tmp_path, share):
    """The second comes out even, so that libjpeg says nothing: its colours are shifted from there on."""
    data = bytearray(jpeg_of("RGB"))
    data[len(data) // share] ^= 0x55
    (tmp_path / "a.jpg").write_bytes(data)
    for resize in (None, Resize("scale", scale=0.4)):
        with pytest.raises(PhotographError, match=r"^damaged"):
            images.decode(tmp_path / "a.jpg", resize)


def test_what_lies_between_the_parts_of_a_jpegs_header_costs_nothing(tmp_path):
    data = jpeg_of("RGB")
    place = data.index(b"\xff\xdb")
    (tmp_path / "a.jpg").write_bytes(data[:place] + bytes(40) + data[place:])
    (tmp_path / "whole.jpg").write_bytes(data)
    found, expected = (images.decode(tmp_path / name).pixels for name in ("a.jpg", "whole.jpg"))
    assert far(found, expected) == 0


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (b"%PDF-1.7\n", "PDF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'>", "SVG"),
        (b"8BPS\0\1", "Photoshop"),
        (b"\0\0\1\0\1\0", "icon"),
        (b"<!DOCTYPE html><html>404", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1", "raw of a camera"),
    ],
)
def test_what_else_is_named_jpg_is_told(tmp_path, start, what):
    (tmp_path / "a.jpg").write_bytes(start + bytes(200))
    for read in (images.check_header, images.decode):
        with pytest.raises(PhotographError, match=f"not a photograph that imatch reads, but .*{what}"):
            read(tmp_path / "a.jpg")


@pytest.mark.parametrize("behind", [False, True])
def test_a_png_with_much_text_is_a_photograph(tmp_path, behind):
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    kind = b"zTXtComment\0\0" + zlib.compress(bytes(5_000_000))
    chunk = struct.pack(">I", len(kind) - 4) + kind + struct.pack(">I", zlib.crc32(kind))
    place = len(data) - 12 if behind else 33
    (tmp_path / "a.png").write_bytes(data[:place] + chunk + data[place:])
    assert images.check_header(tmp_path / "a.png") == COLOUR.shape[:2]
    assert far(images.decode(tmp_path / "a.png").pixels, COLOUR) == 0


@pytest.mark.parametrize(("suffix", "tolerance"), [(".avif", 30), (".jp2", 0), (".jfif", 30), (".heic", 30)])
def test_telephones_and_archives_formats_are_read(tmp_path, suffix, tolerance):
    path = tmp_path / f"a{suffix}"
    if suffix == ".heic":
        heif = pytest.importorskip("pillow_heif")
        exif = with_gps(tmp_path / "gps.jpg", DULUTH)
        with Image.open(exif) as image:
            heif.from_pillow(Image.fromarray(smooth(40, 60))).save(path, quality=95, exif=image.info["exif"])
    else:
        Image.fromarray(smooth(40, 60)).save(path, "JPEG" if suffix == ".jfif" else None)
    assert images.list_photographs(tmp_path)[0] == path.name
    assert images.check_header(path) == (40, 60)
    decoded = images.decode(path)
    assert far(decoded.pixels, smooth(40, 60)) <= tolerance
    assert bool(decoded.position) == (suffix == ".heic")


def test_what_is_not_listed_has_a_remedy():
    assert images.SUFFIXES.isdisjoint(images.OTHERS)
    assert "develop it" in images.OTHERS[".dng"]
    assert ".heic" in images.SUFFIXES or "extra heif" in images.OTHERS[".heic"]


def test_a_file_that_is_gone(tmp_path):
    for read in (images.check_header, images.decode, images.file_digest):
        with pytest.raises(PhotographError, match="No such file"):
            read(tmp_path / "a.jpg")


def test_a_link_to_itself(tmp_path):
    (tmp_path / "a.jpg").symlink_to("a.jpg")
    for read in (images.check_header, images.decode, images.file_digest):
        with pytest.raises(PhotographError, match="symbolic links"):
            read(tmp_path / "a.jpg")


def test_30000_by_30000_pixels_are_refused_by_their_header(tmp_path):
    path = png_of_zeros(tmp_path / "a.png", 30_000)
    for read in (images.check_header, images.decode):
        with pytest.raises(PhotographError, match=r"too large to decode.*900000000 pixels"):
            read(path)


def test_the_same_png_is_decoded_when_it_is_smaller(tmp_path):
    assert far(images.decode(png_of_zeros(tmp_path / "a.png", 300)).pixels, np.zeros((300, 300, 3))) == 0


@pytest.mark.parametrize("suffix", [".png", ".tif", ".gif", ".bmp", ".webp"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_other_truncated_formats_have_no_pixels(tmp_path, suffix, share):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(smooth(300, 400)).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(PhotographError):
        images.decode(path)


@pytest.mark.parametrize("place", [0.2, 0.5, 0.9])
def test_a_damaged_png_is_no_photograph(tmp_path, place):
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[int(len(data) * place)] ^= 255
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(PhotographError, match="broken"):
        images.decode(tmp_path / "a.png")


def test_a_header_is_checked_without_the_pixels(tmp_path):
    Image.fromarray(smooth(300, 400)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    assert images.check_header(tmp_path / "a.png") == (300, 400)


def test_the_digest_is_that_of_the_file(tmp_path):
    data = jpeg_bytes()
    (tmp_path / "a.jpg").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    assert images.decode(tmp_path / "a.jpg").sha256 == images.file_digest(tmp_path / "a.jpg") == digest


# --- the list ---------------------------------------------------------------------------------------------


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def test_the_list_is_sorted_and_leaves_out_what_is_no_photograph(tmp_path):
    touch(tmp_path, "b.jpg", "a.PNG", "sub/c.TIFF", "sub/deep/d.jpeg", ".hidden.jpg", ".git/e.jpg", "f.txt", "jpg")
    assert images.list_photographs(tmp_path) == ["a.PNG", "b.jpg", "sub/c.TIFF", "sub/deep/d.jpeg"]


SYSTEMS = {  # a folder, how many pictures lie in it -> what is said of it
    ("@eaDir/a.jpg", 2): "2 in @eaDir (thumbnails of a NAS)",
    ("@EADIR/a.jpg", 1): "1 in @EADIR (thumbnails of a NAS)",
    ("trip/@__thumb", 1): "1 in @__thumb (thumbnails of a NAS)",
    ("#recycle", 1): "1 in #recycle (deleted files)",
    ("$RECYCLE.BIN/S-1-5", 3): "3 in $RECYCLE.BIN (deleted files)",
    ("#snapshot/monday", 1): "all in #snapshot (older copies)",
    (".Trash-1000/files", 1): "all in .Trash-1000 (hidden)",
    (".thumbnails", 1): "all in .thumbnails (hidden)",
    ("__MACOSX/trip", 1): "1 in __MACOSX (of the system)",
    ("System Volume Information", 1): "1 in System Volume Information (of the system)",
    ("Catalog Previews.lrdata/0", 1): "1 in Catalog Previews.lrdata (previews of Lightroom)",
    ("Mac.photoslibrary/resources/derivatives", 1): "1 in resources (copies in a photo library)",
}


@pytest.mark.parametrize(("folder", "many"), SYSTEMS)
def test_folders_of_systems_hold_no_photographs(tmp_path, folder, many):
    touch(tmp_path, "a.jpg", *(f"{folder}/{i}.jpg" for i in range(many)))
    found = images.list_photographs(tmp_path)
    assert (found, found.left_out) == (["a.jpg"], f"; left out: {SYSTEMS[folder, many]}")


def test_folders_of_ones_own_hold_photographs(tmp_path):
    names = [
        "#recycled/a.jpg",
        "@home/b.jpg",
        "eaDir/c.jpg",
        "library/previews/e.jpg",
        "x.photoslibrary/originals/d.jpg",
    ]
    touch(tmp_path, *names, "@eaDir/note.txt")
    found = images.list_photographs(tmp_path)
    assert (found, found.left_out) == (names, "")
    touch(tmp_path, "#recycle/back/a.jpg")
    assert images.list_photographs(tmp_path / "#recycle") == ["back/a.jpg"]  # who names it, means it


def test_what_is_left_out_is_counted(tmp_path):
    touch(tmp_path, "a.jpg", "b.NEF", "B.nef", "sub/c.dng", "sub/c.jpg", "d.mp4", "._a.jpg", ".DS_Store", "e.csv", "f")
    found = images.list_photographs(tmp_path)
    raw = "1 .dng, 2 .nef (raw of a camera: develop it to TIFF or JPEG)"
    hidden, video = "1 hidden (their names begin with a dot)", "1 .mp4 (a video: take its frames out)"
    assert found == ["a.jpg", "sub/c.jpg"]
    assert found.left_out == f"; left out: {video}, {raw}, {hidden}, 2 other files"


def test_a_closed_folder_of_the_system_is_no_error(tmp_path, monkeypatch):
    touch(tmp_path, "a.jpg", "lost+found/b.jpg", "trip/c.jpg")
    closed, scandir = "lost+found", os.scandir

    def refuse(folder):
        if Path(folder).name == closed:
            raise PermissionError(13, "Permission denied", os.fspath(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert images.list_photographs(tmp_path).left_out == "; left out: all in lost+found (of the system)"
    closed = "trip"
    with pytest.raises(ImatchError, match=r"folder .*trip cannot be listed: Permission denied"):
        images.list_photographs(tmp_path)


def test_names_of_any_letters_are_listed(tmp_path):
    names = ["한글 사진/비행 1.jpg", "a b  c.jpg", "é#%'\"[1].jpg", os.fsdecode(b"\xff\xfe.jpg")]
    touch(tmp_path, *names)
    assert images.list_photographs(tmp_path) == sorted(names)


def test_a_folder_that_links_to_its_parent_is_listed_once(tmp_path):
    touch(tmp_path, "a.jpg", "sub/b.jpg")
    (tmp_path / "sub" / "up").symlink_to("..")
    (tmp_path / "sub" / "self").symlink_to(".")
    (tmp_path / "sub" / "loop").symlink_to("loop")
    assert images.list_photographs(tmp_path) == ["a.jpg", "sub/b.jpg"]


def test_a_linked_folder_is_followed(tmp_path):
    touch(tmp_path, "elsewhere/b.jpg", "data/a.jpg")
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    assert images.list_photographs(tmp_path / "data") == ["a.jpg", "more/b.jpg"]


def test_a_link_that_loops_or_leads_nowhere_is_listed(tmp_path):
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "nowhere.jpg").symlink_to("gone.jpg")
    assert images.list_photographs(tmp_path) == ["loop.jpg", "nowhere.jpg"]


def test_a_folder_that_goes_away_is_named(tmp_path):
    touch(tmp_path, "sub/a.jpg")
    shutil.rmtree(tmp_path / "sub")
    with pytest.raises(ImatchError, match=r"folder .*sub cannot be listed: No such file"):
        images.list_photographs(tmp_path / "sub")


# --- what a photograph looks like ---------------------------------------------------------------------------


def bits(one, other):
    return (int(images.look(one), 16) ^ int(images.look(other), 16)).bit_count()


def test_a_look_says_where_grey_rises_to_the_right():
    rising = np.tile(np.arange(17, dtype=np.uint8)[:, None], (16, 1, 3)).reshape(16, 17, 3)
    assert images.look(rising) == "f" * 64
    assert images.look(rising[:, ::-1]) == images.look(np.full((16, 17, 3), 128, np.uint8)) == "0" * 64
    one = np.zeros((16, 17, 3), np.uint8)
    one[0, 1] = one[15, 16] = 255  # it rises to the second cell of the first row, and to the last of the last
    assert images.look(one) == "8" + "0" * 62 + "1"


def test_a_look_is_of_grey():
    """By luminance: green is lighter than red, red than blue."""
    colours = np.zeros((16, 17, 3), np.uint8)
    for x in range(17):
        colours[:, x, (2, 0, 1)[x % 3]] = 255
    assert images.look(colours) == np.packbits(np.tile([1, 1, 0], 6)[:16][None].repeat(16, 0)).tobytes().hex()


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (500, 3), (16, 17), (251, 333)], ids=str)
def test_any_size_has_a_look(size):
    assert len(images.look(smooth(*size))) == 64


def test_a_look_stays_through_compression_size_and_light(tmp_path):
    photograph = smooth(240, 320, seed=3)
    Image.fromarray(photograph).save(tmp_path / "a.jpg", quality=50)
    assert bits(photograph, images.decode(tmp_path / "a.jpg").pixels) <= 12
    assert bits(photograph, images.decode(tmp_path / "a.jpg", Resize("scale", scale=0.5)).pixels) <= 12
    assert bits(photograph, (photograph * 0.8).astype(np.uint8)) <= 12
    for other in (photograph[:, ::-1], photograph[::-1], smooth(240, 320, seed=4)):
        assert bits(photograph, np.ascontiguousarray(other)) > 60


def test_only_who_asks_gets_a_look(tmp_path):
    Image.fromarray(smooth(20, 30)).save(tmp_path / "a.png")
    assert images.decode(tmp_path / "a.png").look == ""


SIZES = [(by, size) for by in images.RESAMPLING for size in ((300, 200), (1600, 1100), (90, 60))]


@pytest.mark.parametrize(("by", "size"), [*SIZES, ("opencv", (90, 600))], ids=str)
def test_pixels_are_those_of_pillow(by, size, tmp_path):
    """torch's resizing is another library's, and gives the same numbers but for roundings; beyond it is Pillow's.
    OpenCV's filters are others, and differ where there are edges."""
    photograph = Image.fromarray(np.random.default_rng(0).integers(0, 256, (25, 30, 3), np.uint8))
    photograph = photograph.resize(size, Image.Resampling.BICUBIC)
    photograph.save(tmp_path / "a.png")
    ours = images.decode(tmp_path / "a.png", images.Resize("stretch", long_side=128), by=by).pixels.astype(int)
    theirs = np.asarray(photograph.resize((128, 128), Image.Resampling.BICUBIC, reducing_gap=3), int)
    if by == "torch":
        assert np.abs(ours - theirs).max() <= (0 if max(size) >= images.REDUCED * 128 else 2)
        assert (ours != theirs).mean() < 0.02
    else:
        assert np.abs(ours - theirs).max() <= 12
        assert np.abs(ours - theirs).mean() < 2


@pytest.mark.parametrize("by", list(images.RESAMPLING))
def test_what_is_finer_than_a_pixel_becomes_grey(by, tmp_path):
    """Stripes one pixel wide at a third of their size: no wider stripes stand in for them."""
    stripes = np.where(np.arange(300) % 2, 255, 0).astype(np.uint8)
    Image.fromarray(np.dstack([np.tile(stripes, (300, 1))] * 3)).save(tmp_path / "a.png")
    pixels = images.decode(tmp_path / "a.png", Resize("long_side", long_side=100), by=by).pixels[5:-5, 5:-5]
    assert np.abs(pixels.astype(int) - 127).max() <= (45 if by == "opencv" else 25)


@pytest.mark.parametrize("scale", [0.3, 0.77, 1.6])
def test_opencv_shifts_nothing(scale, tmp_path):
    x, y = np.arange(300), np.arange(200)
    blob = 255 - 255 * np.outer(np.exp(-(((y - 120) / 15) ** 2)), np.exp(-(((x - 220) / 15) ** 2)))
    Image.fromarray(np.dstack([np.round(blob).astype(np.uint8)] * 3)).save(tmp_path / "a.png")
    decoded = images.decode(tmp_path / "a.png", Resize("scale", scale=scale))
    found = decoded.to_original(centre_of_darkness(decoded.pixels)[None])
    assert np.abs(found - (220, 120)).max() < 0.05


@pytest.mark.parametrize(
    ("kind", "options", "harm"),
    [
        ("PNG", {}, lambda data: data[:-30] + bytes(1) + data[-29:]),
        ("JPEG", {}, lambda data: data[:-200] + bytes(200)),
        ("TIFF", {"compression": "tiff_adobe_deflate"}, lambda data: data[:3000] + bytes(9) + data[3009:]),
        (
            "TIFF",
            {},
            lambda data: data.replace(struct.pack("<HHII", 257, 4, 1, 64), struct.pack("<HHII", 257, 4, 1, 16)),
        ),
        (
            "TIFF",
            {},
            lambda data: data.replace(struct.pack("<HHIH", 284, 3, 1, 1), struct.pack("<HHIH", 284, 3, 1, 116)),
        ),
        ("TIFF", {}, lambda data: data.replace(struct.pack("<HHI", 284, 3, 1), struct.pack("<HHI", 284, 259, 1))),
    ],
)
def test_what_a_file_says_of_its_own_pixels_is_looked_at(tmp_path, kind, options, harm):
    """Pillow and libtiff look at no checksum, nor whether a header fits what follows it."""
    file = io.BytesIO()
    Image.fromarray(dead_leaves(3, 64)).save(file, kind, **options)
    data = harm(file.getvalue())
    assert data != file.getvalue()
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(PhotographError, match="damaged"):
        images.decode(tmp_path / "a")
