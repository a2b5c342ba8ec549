"""The slide in a TIFF file: which of its images it is, and its pixels, as RGB on white glass.

What samples mean stands in the file's own tags. What these do not call 8-bit RGB is refused by its
name; what was not scanned, tiles that the file leaves out and transparent pixels, is white.
"""

from __future__ import annotations

import math
import shlex
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsity_trap.data.inflate import in_threads
from sparsity_trap.settings import UserError

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPage, TiffPageSeries

_JPEG = (6, 7, 33007, 34892)  # compressions whose decoder makes RGB of YCbCr
_APERIO_YCBCR = 33003  # JPEG 2000 of YCbCr, which no tag and no decoder tells from RGB
_ALPHA = (1, 2)  # extra samples: premultiplied and plain transparency

#: What decoders raise besides, and files that keep their pixels in other files.
_OWN = (TypeError, LookupError, AttributeError)

#: Names of photometric interpretations that hold colours, but not RGB, or none.
_SPACES = {
    "MINISWHITE": "inverted grey",
    "MINISBLACK": "grey",
    "PALETTE": "a palette",
    "SEPARATED": "CMYK",
    "YCBCR": "YCbCr",
    "ICCLAB": "CIELAB",
    "ITULAB": "CIELAB",
}

#: Bytes of decoded tiles and strips that are kept, and that a single one may have. Strips span the
#: image, so that all patches of a row lie in the same ones.
_KEPT, _KEPT_STRIPS, _STRIP = 2**26, 2**29, 2**31

#: An image with this share of the largest one's pixels may be meant as well.
_RIVAL = 0.25

_TILE = (
    "python -c 'import sys, tifffile as t; t.imwrite(sys.argv[2], t.imread(sys.argv[1]), "
    'photometric="rgb", tile=(512, 512), compression="zlib", bigtiff=True)\''
)


class TiffImage:
    """One page of an open TIFF file; ``image[rows, cols]`` reads uint8 ``[h, w, 3]``.

    Only the tiles or strips that a slice meets are read.

    Attributes
    ----------
    shape
        Height, width, 3.
    scanned
        bool ``[rows, cols]`` of tiles (or strips), False where the file leaves one out.
    tile
        Height and width of a tile in pixels.
    """

    def __init__(self, page: TiffPage, path: Path) -> None:
        self._page, self._path = page, path
        self.shape = page.imagelength, page.imagewidth, 3
        self.tile: tuple[int, int] = self.shape[:2]
        self._whole: np.ndarray | None = None
        if page.is_memmappable:  # uncompressed and in one piece
            place = page.dataoffsets[0]
            whole = np.memmap(path, np.uint8, "r", place, page.shape)
            self._whole = np.moveaxis(whole, 0, 2) if page.planarconfig == 2 else whole
            self.scanned = np.ones((1, 1), bool)
            return
        self.tile = page.chunks[0], page.chunks[1]
        down, across = (math.ceil(n / side) for n, side in zip(self.shape, self.tile, strict=False))
        stored = np.array(page.dataoffsets) * np.array(page.databytecounts) > 0
        if stored.size != down * across * self._planes:
            raise UserError(f"{path} lists {stored.size} tiles of its image: copy it again")
        self.scanned = stored.reshape(-1, down, across).all(0)
        strip = math.prod(self.tile) * page.samplesperpixel
        if strip > _STRIP:
            raise UserError(
                f"{path} holds {strip / 1e9:.0f} GB of pixels in one compressed piece, which each "
                f"region would decode anew: tile it, as with {_TILE} {shlex.quote(str(path))} "
                "tiled.tif"
            )
        kept = _KEPT_STRIPS if self.tile[1] >= self.shape[1] else _KEPT
        self._tile = lru_cache(max(kept // strip, 1))(self._decode)

    @property
    def _planes(self) -> int:
        return self._page.samplesperpixel if self._page.planarconfig == 2 else 1

    def __getitem__(self, window: tuple[slice, ...]) -> np.ndarray:
        rows, cols = (part.indices(n)[:2] for part, n in zip(window, self.shape, strict=False))
        if self._whole is not None:
            return _rgb(self._whole[slice(*rows), slice(*cols)], self._page)
        region = np.full((rows[1] - rows[0], cols[1] - cols[0], 3), 255, np.uint8)
        met = [
            range(first // side, -(-stop // side))
            for (first, stop), side in zip((rows, cols), self.tile, strict=True)
        ]
        places = [(r, c) for r in met[0] for c in met[1] if self.scanned[r, c]]
        work = [partial(self._tile, r * self.scanned.shape[1] + c) for r, c in places]
        tiles = in_threads(work) if len(work) > 1 else (read() for read in work)
        for (r, c), tile in zip(places, tiles, strict=True):
            y, x = r * self.tile[0], c * self.tile[1]
            inside = tile[max(rows[0] - y, 0) : rows[1] - y, max(cols[0] - x, 0) : cols[1] - x]
            top, left = max(y - rows[0], 0), max(x - cols[0], 0)
            region[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
        return region

    def close(self) -> None:
        """Forget the tiles that are kept."""
        if self._whole is None:
            self._tile.cache_clear()

    def _decode(self, number: int) -> np.ndarray:
        """RGB of a tile, which may reach over the edge of the image."""
        parts = [self._segment(number + k * self.scanned.size) for k in range(self._planes)]
        return _rgb(np.concatenate(parts, axis=2), self._page)

    def _segment(self, number: int) -> np.ndarray:
        """Samples of a tile, or of one plane of it, ``[h, w, samples]``."""
        page, file = self._page, self._page.parent.filehandle
        try:
            with file.lock:
                file.seek(page.dataoffsets[number])
                data = file.read(page.databytecounts[number])
            tables: dict[str, Any] = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
            samples = page.decode(data, number, **tables)[0]
            if samples is None:
                raise ValueError("no pixels")
            return samples[0]
        except (ValueError, RuntimeError, ImportError, OSError, *_OWN) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"{self._path} is damaged, or compressed in a way that cannot be read here "
                f"({reason}): copy it again, or save it as 8-bit RGB with JPEG or deflate"
            ) from None


def open_slide_page(tiff: TiffFile, path: Path) -> TiffPage:
    """The slide among the images of a file, whole and in 8-bit RGB.

    Raises
    ------
    UserError
        The file holds several images, or one that is not RGB, which the sentence names; or it ends
        before all that its directory promises.
    """
    series = _largest(tiff, path)
    page: Any = series.levels[0].keyframe
    planes = math.prod(series.levels[0].shape) // math.prod(page.shape)
    _check_samples(page, planes if page.samplesperpixel == 1 else 1, path)
    if planes > 1:
        raise UserError(
            f"{path} holds {planes} images of {page.imagelength} x {page.imagewidth} pixels, focal "
            "planes or several scans: save the one to read as a file of its own"
        )
    # A copy that was interrupted opens without an error.
    end = max(map(sum, zip(page.dataoffsets, page.databytecounts, strict=True)), default=0)
    if end > tiff.filehandle.size:
        raise UserError(f"{path} ends after {tiff.filehandle.size} of {end} bytes: copy it again")
    return page


def _largest(tiff: TiffFile, path: Path) -> TiffPageSeries:
    """The largest image; thumbnails, labels and smaller copies of it may lie beside it."""
    found: list[TiffPageSeries] = [s for s in tiff.series if s.levels and s.levels[0].keyframe]
    if not found:
        raise UserError(f"{path} lists no image, its end may be missing: copy it again")

    def size(series: TiffPageSeries) -> tuple[int, int]:
        page: Any = series.levels[0].keyframe
        return page.imagelength, page.imagewidth

    first, *others = sorted(found, key=lambda series: -math.prod(size(series)))
    height, width = size(first)
    for other in others:
        tall, wide = size(other)
        smaller = tall * wide < 0.75 * height * width
        copy = smaller and abs(tall * width / (wide * height) - 1) < 0.02
        if tall * wide > _RIVAL * height * width and not copy:
            raise UserError(
                f"{path} holds several images, of {height} x {width} and {tall} x {wide} pixels: "
                "save the one to read as a file of its own"
            )
    return first


def _check_samples(page: TiffPage, channels: int, path: Path) -> None:
    """Raise ``UserError`` where samples are not red, green, blue and perhaps transparency."""
    name = getattr(page.photometric, "name", str(page.photometric))
    samples, extra = page.samplesperpixel, tuple(page.extrasamples)
    remedy = "save the H&E as 8-bit RGB"
    if name == "MINISBLACK" and (channels > 1 or samples not in (1, 3)):
        several = max(channels, samples)
        raise UserError(f"{path} has {several} grey channels, as of fluorescence: {remedy}")
    if page.dtype != np.uint8 or page.bitspersample != 8:
        bits = page.bitspersample
        raise UserError(f"{path} has samples of {bits} bits ({page.dtype}), not 8: {remedy}")
    # Three grey samples may be RGB that a program did not call so; `check_stain` will tell.
    rgb = name == "RGB" or (name == "MINISBLACK" and samples == 3)
    if name == "YCBCR":
        rgb = page.compression in _JPEG and page.planarconfig == 1 and not extra
    if not rgb:
        raise UserError(f"{path} stores colours as {_SPACES.get(name, name)}, not RGB: {remedy}")
    if samples != 3 and not (samples == 4 and extra and extra[0] in _ALPHA):
        raise UserError(
            f"{path} has {samples} samples a pixel, of which only three are colours and the others "
            f"no transparency (alpha): {remedy}"
        )
    turned = page.tags.valueof(274, 1)
    if turned != 1:
        raise UserError(
            f"{path} is stored turned or mirrored (TIFF orientation {turned}), which programs read "
            "differently: save it upright"
        )


def _rgb(samples: np.ndarray, page: TiffPage) -> np.ndarray:
    """Colours over white glass, uint8 ``[h, w, 3]``."""
    if page.compression == _APERIO_YCBCR:
        from PIL import Image

        size = samples.shape[1::-1]
        samples = np.asarray(Image.frombytes("YCbCr", size, samples.tobytes()).convert("RGB"))
    if samples.shape[2] == 3:
        return samples
    return over_white(samples, premultiplied=page.extrasamples[0] == 1)


def over_white(samples: np.ndarray, premultiplied: bool = False) -> np.ndarray:
    """Colours ``[h, w, 3]`` of pixels with transparency ``[h, w, 4]``, uint8, over white."""
    colours, opaque = samples[..., :3].astype(np.int32), samples[..., 3:].astype(np.int32)
    seen = 255 * colours if premultiplied else opaque * colours
    return ((seen + 255 * (255 - opaque)).clip(0, 255**2) // 255).astype(np.uint8)
