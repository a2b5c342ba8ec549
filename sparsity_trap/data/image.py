"""H&E images: read by region, made small, and where on them there is tissue."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from sparsity_trap.settings import UserError

_HIRES, _LOWRES = 2000, 600  # longest side of small images, pixels, as in Space Ranger
# Optical density of the thinnest tissue, over that of glass. Eosin in loose stroma reaches 0.1.
_TISSUE_DENSITY = 0.05

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPageSeries


@contextmanager
def open_image(path: Path | str) -> Iterator[zarr.Array | np.ndarray]:
    """Open a full-resolution image; slicing what is yielded reads only the tiles needed.

    TIFF, BigTIFF, OME-TIFF and SVS are read by region, PNG and JPEG as a whole.

    Yields
    ------
    Array-like ``[height, width, 3 or 4]`` of uint8. See :func:`read_region`.

    Raises
    ------
    UserError
        The file is missing, damaged or cut short, or holds no 8-bit RGB image.
    """
    import tifffile

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the path of the full-resolution H&E")
    if path.suffix.lower() in (".png", ".jpg", ".jpeg"):
        yield _read_picture(path)
        return
    try:
        tiff = tifffile.TiffFile(path)
    except (tifffile.TiffFileError, OSError) as error:
        raise UserError(
            f"{path} is not a readable TIFF image ({error}): give the full-resolution image"
        ) from None
    with tiff:
        series = _whole_series(tiff, path)
        shape = series.shape
        planar = len(shape) == 3 and shape[0] in (3, 4) and shape[2] not in (3, 4)
        channels = shape[0 if planar else 2] if len(shape) == 3 else 0
        if channels not in (3, 4) or series.dtype != np.uint8:
            raise UserError(f"{path} has shape {shape} of {series.dtype}: convert it to 8-bit RGB")
        try:
            if tiff.pages[0].is_memmappable and not planar:
                # Uncompressed and in one piece: as a zarr array it would be a single chunk.
                yield tifffile.memmap(path, page=0, mode="r")
            else:
                store = series.aszarr(level=0)
                array = zarr.open_array(store, mode="r")
                yield _ChannelsLast(array) if planar else array
                store.close()
        except (tifffile.TiffFileError, RuntimeError) as error:
            # Decoders of tiles raise RuntimeErrors of their own; others are not about the file.
            codec = type(error).__module__.startswith("imagecodecs")
            if isinstance(error, RuntimeError) and not codec:
                raise
            raise UserError(f"{path} is damaged ({error}): copy it again") from None


def read_region(image: zarr.Array | np.ndarray, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
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
        region[top - y0 : bottom - y0, left - x0 : right - x0] = image[top:bottom, left:right, :3]
    return region


def read_mask(path: Path | str, image_shape: tuple[int, ...]) -> np.ndarray:
    """Read a picture that is dark where an image is not to be used.

    A pixel is kept where it is brighter than half of the picture's brightest: masks of 0 and 1, of
    0 and 255, and those whose edges a program has smoothed or compressed are read alike.

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
        The picture cannot be read, or has not the shape of the image.
    """
    from PIL import Image

    try:
        with Image.open(path) as picture:
            # Of a palette, values are numbers of colours; transparency says nothing.
            plain = picture.convert("RGB") if picture.mode in ("P", "PA", "LA") else picture
            values = np.asarray(plain)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(
            f"mask {path} is not a whole picture of usual size ({error}): save it as PNG, of at "
            "most 10,000 pixels a side"
        ) from None
    values = values[..., :3].max(2) if values.ndim == 3 else values
    height, width = values.shape
    expected = image_shape[0] / image_shape[1]
    # A pixel of rounding on the shorter side of a small mask is no error.
    if abs(height / width / expected - 1) > 0.01 + 1 / min(height, width):
        raise UserError(
            f"mask {path} of {height} x {width} pixels has not the shape of the image of "
            f"{image_shape[0]} x {image_shape[1]}: draw it on the whole image, at any scale"
        )
    return values > values.max() / 2


def small_images(
    image: zarr.Array | np.ndarray,
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
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
    enclosed holes under 200 × 200 µm, lumens and vessels, filled. Ink and folds count as tissue:
    give a mask where that matters.

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
    glass = max(200.0, float(np.percentile(grey, 99)))
    density = -np.log10((grey + 1) / (glass + 1))
    tissue = ndimage.gaussian_filter(density, 8 / microns_per_pixel) > _TISSUE_DENSITY
    piece, hole = (math.ceil((um / microns_per_pixel) ** 2) - 1 for um in (100, 200))
    tissue = remove_small_objects(tissue, max_size=piece)
    # Not `remove_small_holes`: it would fill glass that the image's border cuts off.
    filled = ndimage.binary_fill_holes(tissue)
    return filled & ~remove_small_objects(filled & ~tissue, max_size=hole)


class _ChannelsLast:
    """An array ``[channel, height, width]``, as in OME-TIFF, sliced with channels last."""

    def __init__(self, array: zarr.Array):
        self._array = array
        self.shape = (*array.shape[1:], array.shape[0])

    def __getitem__(self, window: tuple[slice, slice, slice]) -> np.ndarray:
        rows, cols, channels = window
        return np.moveaxis(self._array[channels, rows, cols], 0, -1)


def _whole_series(tiff: TiffFile, path: Path) -> TiffPageSeries:
    """First image of a file that holds all the bytes that its directory promises.

    A copy that was interrupted opens without an error, and its last tiles would be read as black.
    """
    if not tiff.series:
        raise UserError(f"{path} lists no image, its end may be missing: copy it again")
    series = tiff.series[0]
    pages: list[Any] = [page for page in series.levels[0].pages if page is not None]
    end = max(
        offset + size
        for page in pages
        for offset, size in zip(page.dataoffsets, page.databytecounts, strict=True)
    )
    if end > tiff.filehandle.size:
        raise UserError(f"{path} ends after {tiff.filehandle.size} of {end} bytes: copy it again")
    return series


def _read_picture(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{path} cannot be read as a picture ({error}): give the full-resolution image as TIFF"
        ) from None
