"""Images read by region in every format, and masks drawn on them."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
from PIL import Image

from sparsity_trap.data.image import open_image, read_mask, read_region
from sparsity_trap.settings import UserError


def test_region_reads_only_the_tiles_it_needs(tmp_path, monkeypatch):
    rng = np.random.default_rng(4)
    pixels = rng.integers(0, 255, (1500, 2100, 3), np.uint8)
    for layout in ({"tile": (256, 256), "compression": "zlib"}, {"rowsperstrip": 64}, {}):
        path = tmp_path / "image.tif"
        tifffile.imwrite(path, pixels, photometric="rgb", **layout)
        with open_image(path) as image:
            assert np.array_equal(
                read_region(image, 300, 420, 1000, 1600), pixels[300:420, 1000:1600]
            )
            over = read_region(image, -10, 5, 2090, 2110)
            assert np.array_equal(over[10:, :10], pixels[:5, 2090:])
            assert (over[:10] == 255).all() and (over[:, 10:] == 255).all()
            assert (read_region(image, 5000, 5003, 0, 4) == 255).all()
    tifffile.imwrite(
        path, pixels, photometric="rgb", tile=(256, 256), compression="zlib", bigtiff=True
    )
    read = []
    original = tifffile.FileHandle.read
    monkeypatch.setattr(
        tifffile.FileHandle, "read", lambda self, *a: read.append(original(self, *a)) or read[-1]
    )
    with open_image(path) as image:
        read.clear()
        read_region(image, 300, 420, 300, 420)
    assert sum(map(len, read)) < 2 * 256 * 256 * 3


def test_pyramid_gives_full_resolution(tmp_path):
    pixels = np.random.default_rng(5).integers(0, 255, (600, 700, 3), np.uint8)
    with tifffile.TiffWriter(tmp_path / "p.btf", bigtiff=True) as tiff:
        options = {"tile": (128, 128), "photometric": "rgb", "compression": "zlib"}
        tiff.write(pixels, subifds=1, **options)
        tiff.write(pixels[::2, ::2], subfiletype=1, **options)
    with open_image(tmp_path / "p.btf") as image:
        assert np.array_equal(read_region(image, 0, 600, 0, 700), pixels)


def test_image_that_is_not_8_bit_rgb(tmp_path):
    tifffile.imwrite(tmp_path / "grey.tif", np.zeros((9, 9), np.uint16))
    with (
        pytest.raises(UserError, match="grey.tif has samples of 16 bits .*8-bit RGB"),
        open_image(tmp_path / "grey.tif"),
    ):
        pass
    (tmp_path / "he.tif").write_bytes(b"no TIFF")
    with (
        pytest.raises(UserError, match="not a readable TIFF image"),
        open_image(tmp_path / "he.tif"),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("he.png", None),
        ("he.svs", {"tile": (32, 32), "compression": "jpeg", "photometric": "rgb"}),
        ("he.ome.tif", {"ome": True, "photometric": "rgb", "metadata": {"axes": "YXS"}}),
        ("planar.ome.tif", {"ome": True, "photometric": "rgb", "planarconfig": "separate",
                            "tile": (32, 32), "compression": "zlib"}),
        ("stripped.tif", {"rowsperstrip": 7, "compression": "zlib", "photometric": "rgb"}),
    ],
)  # fmt: skip
def test_image_formats_read_alike(tmp_path, name, options):
    y, x = np.mgrid[:64, :96]
    picture = np.stack([y * 3, x * 2, 255 - x - y], -1).clip(0, 255).astype(np.uint8)
    path = tmp_path / name
    if options is None:
        Image.fromarray(picture).save(path)
    else:
        planar = options.get("planarconfig") == "separate"
        tifffile.imwrite(path, np.moveaxis(picture, -1, 0) if planar else picture, **options)
    with open_image(path) as image:
        assert tuple(image.shape) == (64, 96, 3)
        region = read_region(image, 10, 30, 80, 100)
    tolerance = 6 if name.endswith("svs") else 0
    assert np.abs(region[:, :16].astype(int) - picture[10:30, 80:]).max() <= tolerance
    assert (region[:, 16:] == 255).all()


def test_damaged_picture_names_the_remedy(tmp_path):
    path = tmp_path / "he.png"
    path.write_bytes(b"not a picture")
    with (
        pytest.raises(UserError, match="he.png cannot be read as a picture.*TIFF"),
        open_image(path),
    ):
        pass


PNG = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")


def half(values: tuple[int, int], dtype: str = "uint8") -> np.ndarray:
    """A picture of 20 x 10 pixels whose upper quarter holds the first value."""
    picture = np.full((20, 10), values[1], dtype)
    picture[:5] = values[0]
    return picture


def transparent(values: tuple[int, int]) -> Image.Image:
    """White, and nothing to be seen in its upper quarter."""
    white = np.full((20, 10, 4), 255, np.uint8)
    white[..., 3] = half(values)
    return Image.fromarray(white)


def indexed(colours: list[int]) -> Image.Image:
    picture = Image.fromarray(half((0, 1))).convert("P")
    picture.putpalette(colours)
    return picture


MASKS = {
    "255": Image.fromarray(half((0, 255))),
    "1": Image.fromarray(half((0, 1))),
    "class 3 of 5": Image.fromarray(half((3, 5))),
    "grey": Image.fromarray(half((150, 200))),
    "16 bit": Image.fromarray(half((0, 60_000), "uint16")),
    "32 bit": Image.fromarray(half((0, 70_000), "int32")),
    "real": Image.fromarray(half((0, 1), "float32")),
    "not a number": Image.fromarray(np.where(half((0, 1)), 1, np.nan).astype("float32")),
    "bits": Image.fromarray(half((0, 255)) > 0),
    "colours": Image.fromarray(half((0, 255))).convert("RGB"),
    "red": Image.merge("RGB", [Image.fromarray(half((0, v))) for v in (200, 0, 0)]),
    "opaque": Image.fromarray(half((0, 255))).convert("LA"),
    "transparent": transparent((0, 255)),
    "palette": Image.fromarray(half((0, 255))).convert("P"),
    "palette of colours": indexed([0, 0, 0, 30, 200, 30]),
    "palette of dark blue": indexed([0, 0, 0, 0, 0, 1]),
    "cmyk": Image.fromarray(half((0, 255))).convert("RGB").convert("CMYK"),
    "ycbcr": Image.fromarray(half((0, 255))).convert("RGB").convert("YCbCr"),
    "cielab": Image.fromarray(half((0, 255))).convert("RGB").convert("LAB"),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_every_kind_mean_the_same(tmp_path, name):
    path = tmp_path / ("mask.png" if MASKS[name].mode in PNG else "mask.tif")
    MASKS[name].save(path)
    assert np.array_equal(read_mask(path, (400, 200)), half((0, 1)) > 0)


@pytest.mark.parametrize("value", [1, 3, 127, 255])
def test_mask_of_one_number(tmp_path, value):
    for number in (value, 0):
        Image.fromarray(np.full((20, 10), number, np.uint8)).save(tmp_path / "mask.png")
        assert (read_mask(tmp_path / "mask.png", (400, 200)) == bool(number)).all()


def test_mask_that_a_viewer_turns(tmp_path):
    exif = Image.Exif()
    exif[274] = 3
    Image.fromarray(half((0, 255))[::-1]).save(tmp_path / "mask.png", exif=exif)
    assert np.array_equal(read_mask(tmp_path / "mask.png", (400, 200)), half((0, 1)) > 0)


@pytest.mark.parametrize(
    "picture",
    [
        np.arange(200, dtype=np.uint16).reshape(20, 10),  # cells
        np.repeat([0, 1, 2, 3], 50).reshape(20, 10).astype(np.uint8),  # classes
        np.repeat([0, 3, 3, 3, 3, 3, 3, 3, 3, 2], 20).reshape(20, 10).astype(np.uint8),
        half((0, 1), "int32") - 1,
    ],
    ids=["cells", "classes", "a rare class", "negative"],
)
def test_what_is_more_than_dark_and_bright_is_no_mask(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "mask.tif")
    with pytest.raises(UserError, match=r"mask .*mask.tif holds .*: save it with 0 where"):
        read_mask(tmp_path / "mask.tif", (400, 200))


def test_smoothed_and_compressed_masks(tmp_path):
    """The edge lies where it was drawn, and noise of the compression is no tissue."""
    large = Image.fromarray(half((0, 255))).resize((100, 200), Image.Resampling.NEAREST)
    large.save(tmp_path / "mask.jpg", quality=50)
    expected = np.arange(200) >= 50
    assert np.array_equal(read_mask(tmp_path / "mask.jpg", (400, 200)).all(1), expected)
    assert np.array_equal(read_mask(tmp_path / "mask.jpg", (400, 200)).any(1), expected)
    Image.new("L", (100, 200), 254).save(tmp_path / "white.jpg")
    assert read_mask(tmp_path / "white.jpg", (400, 200)).all()


@pytest.mark.parametrize("spoil", ["missing", "text", "cut", "huge", "shape"])
def test_mask_that_cannot_be(tmp_path, spoil, monkeypatch):
    mask = tmp_path / "mask.png"
    noise = np.random.default_rng(0).integers(0, 2, (64, 64), dtype=np.uint8)
    Image.fromarray(255 * noise).save(mask)
    assert read_mask(mask, (640, 642)).shape == (64, 64)
    if spoil == "missing":
        mask.unlink()
    elif spoil == "text":
        mask.write_text("none")
    elif spoil == "cut":
        mask.write_bytes(mask.read_bytes()[:200])
    elif spoil == "huge":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    shape = (640, 800) if spoil == "shape" else (640, 640)
    message = "has not the shape of" if spoil == "shape" else "is not a whole picture"
    with pytest.raises(UserError, match=f"mask .*mask.png.*{message}"):
        read_mask(mask, shape)
