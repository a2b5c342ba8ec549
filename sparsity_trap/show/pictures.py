"""Pictures of the gene browser as files: maps and H&E, with their mark in the pixels themselves."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageFont

from sparsity_trap.bins import PATCH_BINS
from sparsity_trap.data.patches import OVERVIEW_BINS, PatchStore

#: A page has to load quickly, and 50 genes of a whole section have to fit the site.
MAP_BYTES, PICTURE_BYTES = 200_000, 600_000
_PICTURE_PIXELS = 1600
#: Steps of colour of a map. Counts fit in 254; predictions of a whole section hardly compress then.
_STEPS = (254, 64, 32, 16)
_OUTSIDE_COLOUR, _INK_COLOUR = (0xED, 0xED, 0xED), (0xA3, 0x20, 0x20)


def write_map(
    path: Path, values: np.ndarray, mask: np.ndarray, top: float, note: str = "", about: str = ""
) -> None:
    """Write a map as a lossless WebP, one pixel per bin, with a note in rows of pixels below it.

    Parameters
    ----------
    path
        The WebP; at most `MAP_BYTES` for a section of 800 x 800 bins.
    values, mask
        ``[H, W]`` UMI per bin, and where it is in tissue.
    top
        Value of the last colour; larger ones show it too. Colours follow the square root.
    note
        Written below the map, so that a copy of the file says what it shows.
    about
        Description among the file's own data (Exif).
    """
    position = np.sqrt(np.clip(np.nan_to_num(values) / top, 0, 1))
    below = np.where(_lettering(note, mask.shape[1])[..., None], _INK_COLOUR, _OUTSIDE_COLOUR)
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = about
    for steps in _STEPS:
        level = np.rint(position * (steps - 1)) / (steps - 1)
        colours = matplotlib.colormaps["magma"](level, bytes=True)[..., :3]
        pixels = np.vstack([np.where(mask[..., None], colours, _OUTSIDE_COLOUR), below])
        # The least method that keeps colours which follow each other near in WebP's palette.
        options = {"lossless": True, "method": 5, "quality": 90, "exif": exif}
        Image.fromarray(pixels.astype(np.uint8)).save(path, "webp", **options)
        if path.stat().st_size <= MAP_BYTES:
            break


def write_picture(path: Path, store: PatchStore, window: tuple[slice, slice], note: str) -> None:
    """Write the H&E of a window as JPEG, finer than the overview where `_PICTURE_PIXELS` allow.

    Parameters
    ----------
    path
        The JPEG; at most `PICTURE_BYTES`, if a quality that can be looked at allows it.
    store
        Gives the overview, and the patches' own images.
    window
        Rows and columns of 8 µm bins.
    note
        Written below the picture.
    """
    overview = store.overview[window]
    rows, columns = overview.shape[:2]
    finer = max((f for f in (4, 2) if f * max(rows, columns) <= _PICTURE_PIXELS), default=1)
    size = (columns * finer, rows * finer)
    picture = Image.fromarray(overview).resize(size, Image.Resampling.BICUBIC)
    side = PATCH_BINS // OVERVIEW_BINS * finer
    for patch, (row, column) in enumerate(store.origin[:] // OVERVIEW_BINS):
        tile = Image.fromarray(store.images[patch]).resize((side, side), Image.Resampling.BOX)
        at = (column - window[1].start) * finer, (row - window[0].start) * finer
        picture.paste(tile, tuple(map(int, at)))
    ink = _lettering(note, columns).repeat(finer, 0).repeat(finer, 1)
    below = np.where(ink[..., None], _INK_COLOUR, _OUTSIDE_COLOUR).astype(np.uint8)
    image = Image.fromarray(np.vstack([np.asarray(picture), below]))
    for quality in range(88, 30, -6):
        image.save(path, "jpeg", quality=quality, optimize=True)
        if path.stat().st_size <= PICTURE_BYTES:
            break


def _lettering(note: str, width: int) -> np.ndarray:
    """The note as pixels, bool [rows, width]: one pixel per dot of a bitmap font, wrapped."""
    if not note:
        return np.zeros((0, width), bool)
    font = ImageFont.load_default_imagefont()
    lines: list[str] = []
    for word in note.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getbbox(joined)[2] <= width - 4:
            lines[-1] = joined
        else:
            lines.append(word)
    height = font.getbbox(note)[3] + 1
    strip = Image.new("1", (width, height * len(lines) + 2))
    draw = ImageDraw.Draw(strip)
    for i, line in enumerate(lines):
        draw.text((2, 1 + i * height), line, fill=1, font=font)
    return np.asarray(strip)
