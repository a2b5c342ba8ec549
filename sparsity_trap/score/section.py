"""The section that predictions are held against: Space Ranger's output, or a patch store.

Both give patches of 256 µm one after the other. Those of Space Ranger's output are cut in the array
frame, in which its tables count rows and columns; pictures of them are turned like the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sparsity_trap.bins import BIN_UM, PATCH_BINS, bin_mask, bin_sum
from sparsity_trap.data.geometry import coarse_fit, fit_grid_to_pixels, orientation_of
from sparsity_trap.data.image import open_image
from sparsity_trap.data.matrix import read_features
from sparsity_trap.data.patches import PatchStore, patch_window, resample
from sparsity_trap.data.sections import Section, is_simulated
from sparsity_trap.data.spaceranger import (
    IMAGE_NAMES,
    MATRIX,
    read_array_shape,
    read_counts,
    read_positions,
    read_scale,
)
from sparsity_trap.settings import MARKS, UserError


def open_section(path: Path | str) -> OutsSection | StoreSection:
    """Open Space Ranger's ``outs`` or a patch store.

    Raises
    ------
    UserError
        It is neither, or a file of it is missing or damaged.
    """
    path = Path(path)
    if (path / "zarr.json").is_file():
        return StoreSection(path)
    return OutsSection(path)


class StoreSection:
    """A patch store: its patches in their order, as `data.patches.PatchStore` describes them."""

    def __init__(self, path: Path) -> None:
        self.store, self.name = PatchStore(path), str(path)
        self.genes, self.patient = self.store.genes, self.store.patient
        self.mark = MARKS.get(self.store.source, "")

    def patches(
        self, genes: Sequence[str], factor: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
        """Counts and tissue of each patch, in bins of ``factor`` times 2 µm, and the true rate."""
        index = [self.genes.index(gene) for gene in genes]
        for i in range(len(self.store)):
            mask, truth = np.asarray(self.store.mask[i]), self.store.truth
            counts = np.asarray(self.store.counts[i])[index]
            rate = None if truth is None else np.asarray(truth[i])[index]
            yield coarser(counts, mask, rate, factor)

    pictured = True

    def picture(self, number: int) -> np.ndarray:
        """H&E of a patch, uint8 [224, 224, 3]."""
        return np.asarray(self.store.images[number])

    def upright(self, maps: np.ndarray) -> np.ndarray:
        """Maps [..., h, w] of a patch, turned like its picture."""
        return maps


class OutsSection:
    """Space Ranger's output, cut into patches of 128 x 128 bins of the array.

    The last row and column of patches reach over the array's end; there is no tissue there.
    """

    def __init__(self, path: Path) -> None:
        if not (path / MATRIX).parent.is_dir():
            raise UserError(
                f"{path} is neither a patch store nor Space Ranger's output: give the 'outs' "
                "folder of a Visium HD run, with its binned_outputs unpacked"
            )
        self.outs, self.name, self.patient = path, str(path), ""
        self.microns_per_pixel, self.array_shape = read_scale(path), read_array_shape(path)
        measured = (name for name in read_features(path / MATRIX) if name is not None)
        self.genes = tuple(dict.fromkeys(measured))
        self.images = [path / name for name in IMAGE_NAMES if (path / name).is_file()]
        self.mark = MARKS["simulated"] if is_simulated(Section(outs=path)) else ""
        positions = read_positions(path)
        self.orientation = orientation_of(coarse_fit(positions.y, positions.x))
        rows, cols = (-(-n // PATCH_BINS) for n in self.array_shape)
        self.tissue = np.zeros((rows * PATCH_BINS, cols * PATCH_BINS), bool)
        self.tissue[: positions.in_tissue.shape[0], : positions.in_tissue.shape[1]] = (
            positions.in_tissue
        )
        self._held: tuple[tuple[str, ...], object] | None = None

    def counts(self, genes: Sequence[str]):
        """Counts of genes as `data.spaceranger.read_counts` gives them, read once."""
        if self._held is None or self._held[0] != tuple(genes):
            self._held = tuple(genes), read_counts(self.outs, genes)
        return self._held[1]

    def bands(
        self, genes: Sequence[str], factor: int
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray | None]]:
        """Number, counts, tissue and, where simulated, true rate of each row of patches.

        Rows without tissue are left out.
        """
        counts, columns = self.counts(genes), self.array_shape[1]
        band = np.empty((len(genes), PATCH_BINS, self.tissue.shape[1]), np.uint16)
        for top in range(0, len(self.tissue), PATCH_BINS):
            mask = self.tissue[top : top + PATCH_BINS]
            if not mask.any():
                continue
            band[:] = 0
            inside = band[:, :, :columns]
            limits = np.array([top * columns, (top + PATCH_BINS) * columns], counts.indices.dtype)
            for g, dense in enumerate(inside):
                own = slice(*counts.indptr[g : g + 2])
                here = slice(*(own.start + np.searchsorted(counts.indices[own], limits)))
                place = counts.indices[here] - limits[0]
                dense[np.divmod(place, columns)] = counts.data[here]
            truth = self._truth(genes, top, band.shape)
            yield top // PATCH_BINS, *coarser(band, mask, truth, factor)

    def _truth(self, genes: Sequence[str], top: int, shape: tuple[int, ...]) -> np.ndarray | None:
        path = self.outs / "truth.zarr"
        if not path.is_dir():
            return None
        import zarr

        group = zarr.open_group(path, mode="r")
        known = list(group.attrs["genes"])
        if not set(genes) <= set(known):
            return None
        found = group["rate"][:, top : top + PATCH_BINS, :]
        rate = np.zeros(shape, np.float16)
        rate[:, : found.shape[1], : found.shape[2]] = found[[known.index(g) for g in genes]]
        return rate

    @property
    def pictured(self) -> bool:
        """Whether there is H&E."""
        return bool(self.images)

    def picture(self, number: int) -> np.ndarray:
        """H&E of a patch, turned like the image, uint8 [224, 224, 3]."""
        row, col = (PATCH_BINS * n for n in np.divmod(number, self.tissue.shape[1] // PATCH_BINS))
        positions = read_positions(self.outs)
        window = patch_window(row, col)
        y, x = positions.y[window], positions.x[window]
        rows, cols = (n + first for n, first in zip(np.indices(y.shape), (row, col), strict=True))
        fit = fit_grid_to_pixels(*(v.ravel() for v in (rows, cols, y, x)))
        with open_image(self.images[0]) as image:
            picture = resample(image, fit, row, col, self.tissue.shape)
        return np.moveaxis(self.upright(np.moveaxis(picture, -1, 0)), 0, -1)

    def upright(self, maps: np.ndarray) -> np.ndarray:
        """Maps [..., h, w] of a patch in the array frame, turned like the image."""
        return self.orientation.apply(maps)


def coarser(
    counts: np.ndarray, mask: np.ndarray, rate: np.ndarray | None, factor: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Counts and rate of 2 µm bins in tissue summed to bins ``factor`` times as wide."""
    if factor == 1:
        return counts, mask, rate
    summed = bin_sum(np.where(mask, counts, 0), factor)
    known = None if rate is None else bin_sum(np.where(mask, rate, 0), factor)
    return summed, bin_mask(mask, factor), known


def factor_of(bin_um: float, name: str) -> int:
    """Bins of 2 µm along one side of a bin."""
    factor = round(bin_um / BIN_UM)
    if factor not in (1, 4):
        raise UserError(f"{name}: bins are {bin_um:g} µm wide: give predictions at 2 or 8 µm")
    return factor
