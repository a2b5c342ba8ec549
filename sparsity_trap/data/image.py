"""H&E images: read by region, made small, and where on them there is tissue."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sparsity_trap.data.tiff import TiffImage, open_slide_page, over_white
from sparsity_trap.settings import UserError

if TYPE_CHECKING:
    import PIL.Image

_HIRES, _LOWRES = 2000, 600  # longest side of small images, pixels, as in Space Ranger
# Optical density of the thinnest tissue, over that of glass. Eosin in loose stroma reaches 0.1.
_TISSUE_DENSITY = 0.05
#: Brightest channel of what programs paint where nothing was scanned; no stain is as dark.
BLACK = 8
#: Grey values that 5 % and half of the pixels of any H&E exceed, and the difference between
#: channels that half of its stained pixels exceed. Fluorescence and grey images do not.
_GLASS, _STAINED, _COLOUR = 128, 64, 4
#: How much greener than red and blue half of the stained pixels may be. Both stains take green out
#: most; an inverted image is green.
_GREEN = 10
_LATTICE, _SQUARE = 12, 32  # squares a side that are looked at, and their pixels
#: µm per pixel of a microscope's images, from 100x to 10x; wider ones cannot show bins of 2 µm.
_FINEST, _COARSEST = 0.05, 1.2
#: Pillow's modes of pictures in colours, and names of some others.
_COLOUR_MODES = ("RGB", "RGBA", "RGBX", "P", "PA")
_MODES = {"CMYK": "CMYK", "YCbCr": "YCbCr", "LAB": "CIELAB"}
_ORIENTATION = 274  # tag of EXIF
_LOSSY = ("JPEG", "JPEG2000", "WEBP")
#: Share of a mask's pixels that may be neither dark nor bright: edges that a program smoothed. Such
#: a program makes whole numbers up to 255 or more; smaller ones are those of classes.
_BETWEEN, _SMOOTHED = 0.1, 64


class Pixels(Protocol):
    """An opened image."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Height, width, channels."""

    def __getitem__(self, window: Any, /) -> np.ndarray:
        """Pixels of a window of rows and columns, uint8 ``[h, w, channels]``."""


@contextmanager
def open_image(path: Path | str) -> Iterator[Pixels]:
    """Open a full-resolution image; slicing what is yielded reads only the tiles needed.

    TIFF, BigTIFF, OME-TIFF and SVS are read by region, PNG and JPEG as a whole. Of a file with
    thumbnail, label and smaller copies, the largest image is taken. What was not scanned is white.

    Yields
    ------
    Array-like ``[height, width, 3]`` of uint8. See :func:`read_region`.

    Raises
    ------
    UserError
        The file is missing, damaged or cut short, or holds no 8-bit RGB image of bright glass, or
        several: the sentence names what it holds.
    """
    import tifffile

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the path of the full-resolution H&E")
    if path.suffix.lower() in (".png", ".jpg", ".jpeg"):
        yield _Picture(path)
        return
    try:
        tiff = tifffile.TiffFile(path)
    except (tifffile.TiffFileError, OSError) as error:
        raise UserError(
            f"{path} is not a readable TIFF image ({error}): give the full-resolution image"
        ) from None
    with tiff:
        tiff.filehandle.set_lock(True)
        page = open_slide_page(tiff, path)
        image = TiffImage(page, path)
        if page.photometric == tifffile.PHOTOMETRIC.MINISBLACK:
            check_stain(image, path)
        try:
            yield image
        finally:
            image.close()


def read_region(image: Pixels, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
    """Read pixels ``[y0:y1, x0:x1]`` of an opened image as RGB.

    The window may reach over the edge; what lies outside is white, like empty glass.

    Returns
    -------
    uint8 array ``[y1 - y0, x1 - x0, 3]``.
    """
    region = np.full((y1 - y0, x1 - x0, 3), 255, np.uint8)
    top, bottom = max(y0, 0), min(y1, image.shape[0])
    left, right = max(x0, 0), min(x1, image.shape[1])
    if top < bottom and left < right:
        region[top - y0 : bottom - y0, left - x0 : right - x0] = image[top:bottom, left:right]
    return region


def scanned(image: Pixels, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Whether pixel positions lie on the image, and not on a tile that its file leaves out."""
    inside = (y >= 0) & (y <= image.shape[0] - 1) & (x >= 0) & (x <= image.shape[1] - 1)
    if not isinstance(image, TiffImage) or image.scanned.all():
        return inside
    rows, cols = (
        (np.where(inside, pixel, 0) // side).astype(int)
        for pixel, side in zip((y, x), image.tile, strict=True)
    )
    return inside & image.scanned[rows, cols]


def check_stain(image: Pixels, path: Path | str) -> None:
    """Raise ``UserError`` where an image has not the bright glass and the colours of H&E.

    A lattice of small squares is looked at; black ones, where nothing was scanned, do not count.
    """
    tops, lefts = (
        np.linspace(0, max(n - _SQUARE, 0), _LATTICE).astype(int) for n in image.shape[:2]
    )
    squares = [image[y : y + _SQUARE, x : x + _SQUARE].reshape(-1, 3) for y in tops for x in lefts]
    pixels = np.concatenate(squares)
    pixels = pixels[pixels.max(1) > BLACK] if (pixels > BLACK).any() else pixels
    grey = pixels.mean(1)
    glass = np.percentile(grey, 95)
    stained = pixels[grey < 0.85 * glass].astype(int)
    some = len(stained) > len(pixels) / 100
    green = some and np.median(stained[:, 1] - stained[:, [0, 2]].mean(1)) > _GREEN
    if glass < _GLASS or np.median(grey) < _STAINED or green:
        raise UserError(
            f"{path} is not pink on white glass, but dark or green, as fluorescence and inverted "
            "images are: give the H&E, as 8-bit RGB"
        )
    if some and np.median(np.ptp(stained, axis=1)) < _COLOUR:
        raise UserError(f"{path} has no colours, only greys: give the H&E, as 8-bit RGB")


def check_scale(microns_per_pixel: float, path: Path | str) -> None:
    """Raise ``UserError`` where the width of a pixel is not that of a microscope's image."""
    if not _FINEST <= microns_per_pixel <= _COARSEST:
        raise UserError(
            f"microns_per_pixel is {microns_per_pixel:g} for {path}, not between {_FINEST} and "
            f"{_COARSEST}: bins of 2 µm need the full-resolution image (about 0.25 at 40×, 0.5 at "
            "20×)"
        )


def read_mask(path: Path | str, image_shape: tuple[int, ...]) -> np.ndarray:
    """Read a picture that is dark where an image is not to be used.

    Of two numbers the larger one is kept, whatever they are; a picture of one number is kept as a
    whole unless that is 0. Among more, as where a program has smoothed or compressed the edges,
    what is brighter than half of the brightest is kept, if nearly all pixels are clearly dark or
    bright. Transparent pixels are dark.

    Parameters
    ----------
    path
        Picture of the image's whole field of view, at any scale.
    image_shape
        Height and width of the image.

    Returns
    -------
    bool ``[h, w]``, in the picture's own pixels.

    Raises
    ------
    UserError
        The picture cannot be read, has not the shape of the image, or is not of two kinds, such as
        a map of several classes.
    """
    from PIL import Image

    try:
        with Image.open(path) as picture:
            exact, values = picture.format not in _LOSSY, _brightness(picture)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"mask {path} is not a whole picture of usual size ({error}): save it as PNG, of at "
            "most 10,000 pixels a side"
        ) from None
    height, width = values.shape
    expected = image_shape[0] / image_shape[1]
    # A pixel of rounding on the shorter side of a small mask is no error.
    if abs(height / width / expected - 1) > 0.01 + 1 / min(height, width):
        raise UserError(
            f"mask {path} of {height} x {width} pixels has not the shape of the image of "
            f"{image_shape[0]} x {image_shape[1]}: draw it on the whole image, at any scale"
        )
    lowest, highest = values.min(), values.max()
    if lowest < 0:
        raise UserError(f"mask {path} holds {lowest:g}: save it with 0 where bins are left out")
    if lowest == highest:
        return values > 0
    if exact and ((values == lowest) | (values == highest)).all():
        return values == highest
    share = values / highest
    classes = exact and highest < _SMOOTHED and (values == values.round()).all()
    if classes or ((share > 0.25) & (share < 0.75)).mean() > _BETWEEN:
        raise UserError(
            f"mask {path} holds more than dark and bright, such as numbers of classes from "
            f"{lowest:g} to {highest:g}: save it with 0 where bins are left out and 255 elsewhere"
        )
    return share > 0.5


def _brightness(picture: PIL.Image.Image) -> np.ndarray:
    """Brightness ``[h, w]`` of a picture of any mode as it is seen on black."""
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(picture)
    if picture.has_transparency_data:
        colours = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), colours)
    if picture.mode == "LAB":
        picture = picture.getchannel("L")
    elif picture.mode not in ("1", "L", "I", "F") and not picture.mode.startswith("I;"):
        picture = picture.convert("RGB")
    values = np.nan_to_num(np.asarray(picture, np.float32))
    return values.max(2) if values.ndim == 3 else values


def small_images(image: Pixels) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Shrink an opened image, read strip by strip.

    Returns
    -------
    images
        ``hires`` and ``lowres``, uint8 ``[h, w, 3]`` of at most 2000 and 600 pixels a side.
    scales
        ``tissue_hires_scalef`` and ``tissue_lowres_scalef``: their pixels per pixel of the image.
    """
    height, width = image.shape[:2]
    step = -(-max(height, width) // _HIRES)
    # Whole blocks of pixels, of which one row of the small image at least.
    bottom, right = (max(n // step, 1) * step for n in (height, width))
    rows = step * max(1, 512 // step)
    strips = [
        _shrink(read_region(image, top, min(top + rows, bottom), 0, right), step)
        for top in range(0, bottom, rows)
    ]
    hires = np.concatenate(strips)
    again = -(-max(hires.shape) // _LOWRES)
    scales = {"tissue_hires_scalef": 1 / step, "tissue_lowres_scalef": 1 / (step * again)}
    return {"hires": hires, "lowres": _shrink(hires, again)}, scales


def _shrink(image: np.ndarray, step: int) -> np.ndarray:
    """Means over squares of pixels; what is left over at the ends is cut off."""
    from skimage.transform import downscale_local_mean

    rows, cols = (max(n // step, 1) * step for n in image.shape[:2])
    return np.rint(downscale_local_mean(image[:rows, :cols], (step, step, 1))).astype(np.uint8)


def tissue_mask(image: np.ndarray, microns_per_pixel: float) -> np.ndarray:
    """Tissue in a small H&E image, by optical density.

    Optical density is -log10 of the grey value over that of glass (the image's 99th percentile, at
    least 200), smoothed by 8 µm; above 0.05 is tissue. Pieces under 100 × 100 µm are dropped, and
    enclosed holes under 200 × 200 µm, lumens and vessels, filled. Black, which programs paint where
    nothing was scanned, is glass. Ink and folds count as tissue: give a mask where that matters.

    Parameters
    ----------
    image
        uint8 ``[h, w, 3]``.
    microns_per_pixel
        Of this image.

    Returns
    -------
    bool ``[h, w]``.
    """
    from scipy import ndimage
    from skimage.morphology import remove_small_objects

    grey = image.astype(np.float32).mean(2)
    # With the pixels around, which are means over black and glass.
    grey[ndimage.binary_dilation(image.max(2) <= BLACK, np.ones((3, 3)))] = 255
    glass = max(200.0, float(np.percentile(grey, 99)))
    density = -np.log10((grey + 1) / (glass + 1))
    tissue = ndimage.gaussian_filter(density, 8 / microns_per_pixel) > _TISSUE_DENSITY
    piece, hole = (math.ceil((um / microns_per_pixel) ** 2) - 1 for um in (100, 200))
    tissue = remove_small_objects(tissue, max_size=piece)
    # Not `remove_small_holes`: it would fill glass that the image's border cuts off.
    filled = ndimage.binary_fill_holes(tissue)
    return filled & ~remove_small_objects(filled & ~tissue, max_size=hole)


class _Picture:
    """A PNG or JPEG file, decoded when it is first sliced."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.shape = *self._open(lambda picture: picture.size)[::-1], 3

    def __getitem__(self, window: tuple[slice, ...]) -> np.ndarray:
        return self._pixels[window]

    @cached_property
    def _pixels(self) -> np.ndarray:
        return self._open(_colours)

    def _open(self, read: Callable[[PIL.Image.Image], Any]) -> Any:
        """What is read of the picture, where that is in colours and stands upright."""
        from PIL import Image

        try:
            with Image.open(self._path) as picture:
                space, turned = picture.mode, picture.getexif().get(_ORIENTATION, 1)
                if space in _COLOUR_MODES and turned == 1:
                    return read(picture)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(
                f"{self._path} cannot be read as a picture ({error}): give the full-resolution "
                "image as TIFF"
            ) from None
        if turned != 1:
            raise UserError(
                f"{self._path} is stored turned or mirrored (EXIF orientation {turned}), which "
                "programs read differently: save it upright"
            )
        raise UserError(
            f"{self._path} stores colours as {_MODES.get(space, 'grey')}, not RGB: save the H&E as "
            "8-bit RGB"
        )


def _colours(picture: PIL.Image.Image) -> np.ndarray:
    """RGB of a picture, over white where it is transparent."""
    if picture.has_transparency_data:
        return over_white(np.asarray(picture.convert("RGBA")))
    return np.asarray(picture.convert("RGB"))
