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
        pytest.raises(UserError, match="grey.tif has shape .*8-bit RGB"),
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


def half(values: tuple[int, int], dtype: str = "uint8") -> np.ndarray:
    """A picture of 20 x 10 pixels whose upper quarter holds the first value."""
    picture = np.full((20, 10), values[1], dtype)
    picture[:5] = values[0]
    return picture


@pytest.mark.parametrize(
    "picture",
    [
        Image.fromarray(half((0, 255))),
        Image.fromarray(half((0, 1))),
        Image.fromarray(half((0, 60_000), "uint16")),
        Image.fromarray(half((0, 255)) > 0),
        Image.fromarray(half((0, 255))).convert("RGB"),
        Image.fromarray(half((0, 255))).convert("LA"),
        Image.fromarray(half((0, 255))).convert("P"),
    ],
    ids=["255", "1", "16 bit", "bits", "colours", "transparent", "palette"],
)
def test_masks_of_every_kind_mean_the_same(tmp_path, picture):
    picture.save(tmp_path / "mask.png")
    assert np.array_equal(read_mask(tmp_path / "mask.png", (400, 200)), half((0, 1)) > 0)


def test_smoothed_and_compressed_masks(tmp_path):
    """The edge lies where it was drawn, and noise of the compression is no tissue."""
    large = Image.fromarray(half((0, 255))).resize((100, 200), Image.Resampling.NEAREST)
    large.save(tmp_path / "mask.jpg", quality=50)
    expected = np.arange(200) >= 50
    assert np.array_equal(read_mask(tmp_path / "mask.jpg", (400, 200)).all(1), expected)
    assert np.array_equal(read_mask(tmp_path / "mask.jpg", (400, 200)).any(1), expected)
    Image.new("L", (10, 20)).save(tmp_path / "black.png")
    assert not read_mask(tmp_path / "black.png", (400, 200)).any()


@pytest.mark.parametrize("spoil", ["missing", "text", "cut", "huge", "shape"])
def test_mask_that_cannot_be(tmp_path, spoil, monkeypatch):
    mask = tmp_path / "mask.png"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(mask)
    assert read_mask(mask, (640, 642)).shape == (64, 64)
    if spoil == "missing":
        mask.unlink()
    elif spoil == "text":
        mask.write_text("none")
    elif spoil == "cut":
        mask.write_bytes(mask.read_bytes()[:2000])
    elif spoil == "huge":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    shape = (640, 800) if spoil == "shape" else (640, 640)
    message = "has not the shape of" if spoil == "shape" else "is not a whole picture"
    with pytest.raises(UserError, match=f"mask .*mask.png.*{message}"):
        read_mask(mask, shape)
