"""Images as scanners and programs write them: right colours on white glass, or a sentence."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy import ndimage

from sparsity_trap.data import tiff as tiff_module
from sparsity_trap.data.image import check_stain, open_image, read_region, scanned, tissue_mask
from sparsity_trap.settings import UserError

SHAPE = 200, 264


def slide(shape: tuple[int, int] = SHAPE, glass: int = 40) -> np.ndarray:
    """Pink tissue with purple nuclei on white glass, smooth enough for JPEG."""
    rough = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=shape), 8)
    nuclei = (rough > rough.std()).astype(np.float32)[..., None]
    rgb = (1 - nuclei) * (225, 150, 195) + nuclei * (110, 60, 140)
    inside = np.zeros(shape, bool)
    inside[glass:-glass, glass:-glass] = True
    return ndimage.gaussian_filter(np.where(inside[..., None], rgb, 243), (2, 2, 0)).astype(
        np.uint8
    )


RGB = slide()
DARK = 255 - RGB
TILED = {"tile": (64, 64), "compression": "zlib"}


def read(path: Path) -> np.ndarray:
    """What a prediction reads of an image file, whole."""
    with open_image(path) as image:
        check_stain(image, path)
        return read_region(image, 0, image.shape[0], 0, image.shape[1])


def tif(data: np.ndarray = RGB, **options: object) -> Callable[[Path], None]:
    return lambda path: tifffile.imwrite(path, data, **{"photometric": "rgb", **options})


def pillow(mode: str, **options: object) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(RGB).convert(mode).save(path, **options)


def tiles(encode: Callable[[np.ndarray], bytes], data: np.ndarray = RGB) -> Iterator[bytes]:
    for y in range(0, data.shape[0], 64):
        for x in range(0, data.shape[1], 64):
            tile = np.full((64, 64, data.shape[2]), 243, np.uint8)
            part = data[y : y + 64, x : x + 64]
            tile[: part.shape[0], : part.shape[1]] = part
            yield encode(tile)


def aperio_33003(path: Path) -> None:
    """JPEG 2000 of YCbCr, while the tag says RGB."""
    spec = imagecodecs.JPEG2K.CLRSPC.UNSPECIFIED
    encoded = tiles(
        lambda t: imagecodecs.jpeg2k_encode(
            t, codecformat="j2k", level=0, mct=False, colorspace=spec
        ),
        np.asarray(Image.fromarray(RGB).convert("YCbCr")),
    )
    tifffile.imwrite(
        path, encoded, shape=RGB.shape, dtype="u1", photometric="rgb", tile=(64, 64),
        compression=33003,
    )  # fmt: skip


def with_alpha(premultiplied: bool) -> np.ndarray:
    """The slide with its glass transparent, and black beneath."""
    opaque = (RGB.min(2) < 240).astype(np.uint8) * 255
    opaque[100:120, 100:120] = 128
    colours = np.where(opaque[..., None] > 0, RGB, 0).astype(float)
    if premultiplied:
        colours = np.rint(colours * opaque[..., None] / 255)
    return np.dstack([colours.astype(np.uint8), opaque])


READ = {
    "deflate": tif(**TILED),
    "strips": tif(compression="lzw", rowsperstrip=7),
    "one strip": tif(compression="zlib", rowsperstrip=10**6),
    "uncompressed": tif(),
    "uncompressed tiles": tif(tile=(64, 64)),
    "planes": tif(np.moveaxis(RGB, 2, 0), planarconfig="separate", **TILED),
    "planes in strips": tif(np.moveaxis(RGB, 2, 0), planarconfig="separate", compression="zlib"),
    "planes uncompressed": tif(np.moveaxis(RGB, 2, 0), planarconfig="separate"),
    "jpeg": tif(tile=(64, 64), compression="jpeg", compressionargs={"level": 95}),
    "jpeg of rgb": tif(
        tile=(64, 64), compression="jpeg", compressionargs={"level": 95, "outcolorspace": "rgb"}
    ),
    "jpeg 2000": tif(tile=(64, 64), compression="aperio_jp2000_rgb"),
    "aperio 33003": aperio_33003,
    "imagej": tif(imagej=True),
    "big": tif(bigtiff=True, **TILED),
    "big endian": tif(byteorder=">", **TILED),
    # RGB that a program did not call so.
    "called grey": tif(photometric="minisblack", planarconfig="contig", **TILED),
    "png": pillow("RGB", format="png"),
}


@pytest.mark.parametrize("write", READ.values(), ids=READ)
def test_colours_are_right(tmp_path, write):
    path = tmp_path / ("slide.png" if write is READ["png"] else "slide.tif")
    write(path)
    assert np.abs(read(path).astype(int) - RGB).mean() < 2


@pytest.mark.parametrize("kind", ["tif", "premultiplied", "planes", "png"])
def test_transparent_pixels_are_glass(tmp_path, kind):
    data, path = with_alpha(kind == "premultiplied"), tmp_path / "slide.tif"
    if kind == "png":
        path = path.with_suffix(".png")
        Image.fromarray(data).save(path)
    elif kind == "planes":
        tif(np.moveaxis(data, 2, 0), planarconfig="separate", **TILED)(path)
    else:
        alpha = "assocalpha" if kind == "premultiplied" else "unassalpha"
        tif(data, extrasamples=[alpha], **TILED)(path)
    found = read(path).astype(int)
    assert (found[data[..., 3] == 0] == 255).all()
    solid = data[..., 3] == 255
    assert (found[solid] == RGB[solid]).all()
    assert np.abs(found[100:120, 100:120] - (RGB[100:120, 100:120] * 128.0 / 255 + 127)).max() < 2


def channels(number: int, **options: object) -> Callable[[Path], None]:
    return tif(
        np.stack([DARK[..., 0]] * number), photometric="minisblack", ome=True,
        metadata={"axes": "CYX"}, **options,
    )  # fmt: skip


def focal_planes(path: Path) -> None:
    with tifffile.TiffWriter(path) as file:
        for _ in range(3):
            file.write(RGB, metadata=None, photometric="rgb", **TILED)


def two_scans(path: Path) -> None:
    with tifffile.TiffWriter(path, ome=True) as file:
        for scan in (RGB, RGB[:, :150]):
            file.write(scan, photometric="rgb", metadata={"axes": "YXS"}, **TILED)


REFUSED = {
    "cmyk": (pillow("CMYK"), "CMYK"),
    "cielab": (pillow("LAB"), "CIELAB"),
    "ycbcr": (pillow("YCbCr"), "YCbCr"),
    "palette": (pillow("P"), "palette"),
    "grey": (pillow("L"), "colours as grey"),
    "black and white": (pillow("1"), "bits"),
    "grey called rgb": (tif(np.repeat(RGB[..., 1:2], 3, 2), **TILED), "no colours"),
    "grey inverted": (
        tif(DARK, photometric="miniswhite", planarconfig="contig", **TILED),
        "inverted grey",
    ),
    "inverted called rgb": (tif(DARK, **TILED), "not pink on white glass"),
    # No glass is in sight.
    "inverted within tissue": (
        tif(DARK[40:-40, 40:-40], tile=(64, 64)),
        "not pink on white glass",
    ),
    "all black": (tif(np.zeros_like(RGB), **TILED), "not pink on white glass"),
    "16 bits": (tif(RGB.astype(np.uint16) * 257, **TILED), "16 bits"),
    "real numbers": (tif(RGB.astype(np.float32), **TILED), "32 bits"),
    "signed": (tif((RGB // 2).astype(np.int8), photometric="rgb", **TILED), "int8"),
    "fluorescence of three": (channels(3, **TILED), "3 grey channels, as of fluorescence"),
    "fluorescence of five": (channels(5), "5 grey channels, as of fluorescence"),
    "fluorescence in pages": (
        tif(np.stack([DARK[..., 0]] * 4), photometric="minisblack", metadata=None),
        "4 grey channels, as of fluorescence",
    ),
    "fluorescence in samples": (
        tif(DARK, photometric="minisblack", planarconfig="contig", **TILED),
        "not pink on white glass",
    ),
    "fourth sample": (
        tif(with_alpha(False), extrasamples=["unspecified"], **TILED),
        "4 samples a pixel",
    ),
    "focal planes": (focal_planes, "3 images of 200 x 264"),
    "two scans": (two_scans, "several images, of 200 x 264 and 200 x 150"),
    "upside down": (tif(extratags=[(274, 3, 1, 3, True)], **TILED), "orientation 3"),
}


@pytest.mark.parametrize(("write", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_rgb_is_named(tmp_path, write, message):
    write(tmp_path / "slide.tif")
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / "slide.tif")
    assert "slide.tif" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "mode", "message"),
    [("slide.png", "L", "grey"), ("slide.png", "LA", "grey"), ("slide.jpg", "CMYK", "CMYK"),
     ("slide.png", "1", "grey")],
)  # fmt: skip
def test_pictures_that_are_not_rgb_are_named(tmp_path, name, mode, message):
    pillow(mode)(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} stores colours as {message}, not RGB"):
        read(tmp_path / name)


def test_turned_picture(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    pillow("RGB", exif=exif)(tmp_path / "slide.jpg")
    with pytest.raises(UserError, match=r"slide.jpg is stored turned .* 6\)"):
        read(tmp_path / "slide.jpg")


def test_the_largest_image_is_taken(tmp_path):
    """Before it a thumbnail, a label, and a smaller copy that nothing calls so."""
    with tifffile.TiffWriter(tmp_path / "slide.tif") as file:
        file.write(np.ascontiguousarray(RGB[::2, ::2]), photometric="rgb", metadata=None)
        file.write(RGB[:60, :50], photometric="rgb", metadata=None)
        file.write(RGB, photometric="rgb", metadata=None, **TILED)
    assert np.array_equal(read(tmp_path / "slide.tif"), RGB)
    with tifffile.TiffWriter(tmp_path / "slide.ome.tif", ome=True) as file:
        for name, data in (("label", RGB[::4, ::4]), ("slide", RGB)):
            file.write(data, photometric="rgb", metadata={"axes": "YXS", "Name": name})
    assert np.array_equal(read(tmp_path / "slide.ome.tif"), RGB)


def leave_out(path: Path, *numbers: int) -> None:
    """Take tiles out of a file, as scanners do that skip empty glass."""
    with tifffile.TiffFile(path, mode="r+") as file:
        for name in ("TileOffsets", "TileByteCounts"):
            tag = file.pages[0].tags[name]
            values = list(tag.value)
            for number in numbers:
                values[number] = 0
            tag.overwrite(values)


@pytest.mark.parametrize("layout", ["deflate", "jpeg", "planes", "uncompressed tiles"])
def test_tiles_that_were_not_scanned_are_glass(tmp_path, layout):
    path = tmp_path / "slide.tif"
    READ[layout](path)
    whole = read(path)
    leave_out(path, 0, 6)  # one of the corner, one of tissue, in the first plane
    expected = whole.copy()
    expected[:64, :64] = expected[64:128, 64:128] = 255
    assert np.array_equal(read(path), expected)
    with open_image(path) as image:
        y, x = np.array([10.0, 70, 70, 190, -1, 199.5]), np.array([10.0, 70, 10, 260, 5, 5])
        assert scanned(image, y, x).tolist() == [False, False, True, True, False, False]


def test_black_is_no_tissue():
    """Where programs paint what was not scanned black, with a blurred edge and JPEG's noise."""
    image = np.kron(slide((160, 160), 30), np.ones((4, 4, 1), np.uint8))
    plain = tissue_mask(image, 4.0)
    image[:, 400:] = np.random.default_rng(0).integers(0, 4, (640, 240, 3))
    image[:, 399] = image[:, 399] // 2
    found = tissue_mask(image, 4.0)
    assert not found[:, 404:].any()
    assert (found[:, :390] == plain[:, :390]).mean() > 0.97 and found[:, :390].any()


def test_strips_are_decoded_once(tmp_path, monkeypatch):
    """They span the image, so that all patches of a row lie in the same ones."""
    path = tmp_path / "slide.tif"
    for layout in ("one strip", "strips"):
        READ[layout](path)
        read_from = tifffile.FileHandle.read
        got: list[int] = []

        def count(file, *size, got=got, read_from=read_from):
            data = read_from(file, *size)
            got.append(len(data))
            return data

        with monkeypatch.context() as patch, open_image(path) as image:
            patch.setattr(tifffile.FileHandle, "read", count)
            for y in range(0, 200, 20):
                for x in range(0, 264, 20):
                    found = read_region(image, y, y + 20, x, x + 20)
                    assert np.array_equal(found[: 200 - y, : 264 - x], RGB[y : y + 20, x : x + 20])
        assert 0 < sum(got) < 1.1 * path.stat().st_size


def test_a_piece_too_large_is_refused_with_the_command_that_tiles_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tiff_module, "_STRIP", 100_000)
    path = tmp_path / "my slide.tif"
    READ["one strip"](path)
    with pytest.raises(UserError, match=r"my slide.tif holds .* in one compressed piece") as caught:
        read(path)
    _, *arguments = shlex.split("python -c" + str(caught.value).split("python -c")[1])
    subprocess.run([sys.executable, *arguments], cwd=tmp_path, check=True)
    monkeypatch.undo()
    assert np.array_equal(read(tmp_path / "tiled.tif"), RGB)


def test_pixels_that_cannot_be_decoded(tmp_path):
    path = tmp_path / "slide.tif"
    READ["deflate"](path)
    with tifffile.TiffFile(path, mode="r+") as file:
        file.pages[0].tags["Compression"].overwrite(60_000)
    with pytest.raises(UserError, match=r"slide.tif is damaged, or compressed .*: copy it again"):
        read(path)
