"""Predictions laid over a section: the same genes, the same bins, patch by patch.

Rows of a table may come in any order. They are written once to a temporary file for each row of
patches, from which they are read back as often as they are wanted. So a table of 8.7 million bins
and 50 genes takes about 2 GB of temporary files, and in memory one row of patches.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsity_trap.bins import BIN_UM, PATCH_BINS
from sparsity_trap.evaluation.evaluate import UNITS, evaluate
from sparsity_trap.evaluation.result import Evaluation
from sparsity_trap.score import predictions
from sparsity_trap.score.overview import Overview
from sparsity_trap.score.predictions import Maps, Table
from sparsity_trap.score.section import OutsSection, StoreSection, factor_of, open_section
from sparsity_trap.settings import UserError

if TYPE_CHECKING:
    from anndata import AnnData

#: Genes of one card: what each takes in memory is a few MB.
MOST_GENES = 500

_SPOOL_BYTES = 2**20  # of a row of patches, in memory before a file takes over

#: Share of predicted bins off the tissue that is called suspicious.
_OFF_TISSUE = 0.2

Patch = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]


@dataclass
class Pairing:
    """Predictions and counts of the same bins.

    Attributes
    ----------
    name, section
        The predictions, and what they are held against.
    genes, missing
        Scored, and predicted but not measured.
    bin_um, units
        Of the predictions.
    source
        `Rows` of an array, or `Maps` in the order of a store.
    coverage
        Share of the section's tissue bins that is predicted; filled as patches are read.
    findings
        What looks like a mistake, in sentences.
    numbers
        Number in the section of each patch that is scored.
    """

    name: str
    section: OutsSection | StoreSection
    genes: tuple[str, ...]
    missing: tuple[str, ...]
    bin_um: float
    units: str
    source: Any
    findings: list[str] = field(default_factory=list)
    tissue: int = 0
    predicted: int = 0
    numbers: list[int] = field(default_factory=list)

    @property
    def coverage(self) -> float:
        """Share of the section's tissue bins, in patches and around, that is predicted."""
        return self.predicted / max(self.tissue, 1)

    @property
    def summable(self) -> bool:
        """Whether these are counts of 2 µm bins, which may be rescaled and summed."""
        return self.bin_um == BIN_UM and self.units in ("counts", "log1p counts")

    def patches(self) -> Iterator[Patch]:
        """Counts, prediction, bins in tissue and predicted, and true rate, of each patch.

        Patches without any such bin are left out.
        """
        self.tissue = self.predicted = 0
        self.numbers = []
        factor = factor_of(self.bin_um, self.name)
        for number, counts, rate, tissue, known, truth in self._all(factor):
            mask = tissue & known
            self.tissue += int(tissue.sum())
            self.predicted += int(mask.sum())
            if mask.any():
                self._check(rate, mask)
                self.numbers.append(number)
                yield counts, rate, mask, truth

    def _all(self, factor: int) -> Iterator[tuple[Any, ...]]:
        if isinstance(self.section, StoreSection):
            yield from self._of_store(self.section, factor)
            return
        side = PATCH_BINS // factor
        for i, counts, tissue, truth in self.section.bands(self.genes, factor):
            rate, known = self.source.band(i, tissue.shape)
            for left in range(0, tissue.shape[1], side):
                part = np.s_[..., left : left + side]
                if not tissue[part].any():
                    continue
                number = (i * tissue.shape[1] + left) // side
                # Copies: patches may be kept, and rows of patches are large and written anew.
                patch = (x[part].copy() for x in (counts, rate, tissue, known))
                yield number, *patch, None if truth is None else truth[part].copy()

    def _of_store(self, section: StoreSection, factor: int) -> Iterator[tuple[Any, ...]]:
        index = [self.source.genes.index(gene) for gene in self.genes]
        for i, (counts, tissue, truth) in enumerate(section.patches(self.genes, factor)):
            rate = np.asarray(self.source.rate[i])[index]
            yield i, counts, rate, tissue, ~np.isnan(rate).all(0), truth

    def _check(self, rate: np.ndarray, mask: np.ndarray) -> None:
        """One sentence on values that cannot be what they are said to be."""
        inside = rate[:, mask]
        wrong = ~np.isfinite(inside)
        if wrong.any():
            raise UserError(
                f"{self.name}: gene {self.genes[wrong.any(1).argmax()]} has values that are not "
                "numbers in tissue: leave the gene out, or the bins out of the table"
            )
        if UNITS[self.units] and (inside < 0).any():
            raise UserError(
                f"{self.name}: gene {self.genes[(inside < 0).any(1).argmax()]} has negative values "
                f"and so no {self.units}: say the right units, such as log-normalised or z-score"
            )

    def rates(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Counts, rates of counts and bins to score, of each patch."""
        for counts, rate, mask, _ in self.patches():
            yield counts, np.expm1(rate) if self.units == "log1p counts" else rate, mask

    def mean(self) -> np.ndarray:
        """Mean count per bin of each gene, over the bins that are scored, [G]."""
        total, bins = np.zeros(len(self.genes)), 0
        for counts, _, mask, _ in self.patches():
            total += counts[:, mask].sum(1, dtype=np.float64)
            bins += int(mask.sum())
        return total / max(bins, 1)

    def evaluate(self, train_mean: np.ndarray | None = None) -> Evaluation:
        """`evaluation.evaluate` of all patches.

        Raises
        ------
        UserError
            No bin of the tissue is predicted, or a value cannot be what it is said to be.
        """
        mean = self.mean()
        if not self.predicted:
            raise UserError(
                f"{self.name} predicts no bin in the tissue of {self.section.name}: give "
                "predictions of this section, counted in its own array rows and columns"
            )
        batches = ([x[None] for x in patch if x is not None] for patch in self.patches())
        try:
            found = evaluate(
                batches, None, None, train_mean, self.genes,
                section_mean=mean, bin_um=self.bin_um, units=self.units, name=self.name,
            )  # fmt: skip
        except ValueError as error:
            raise UserError(f"{error}; are these {self.units}?") from error
        found.findings = self.findings + found.findings
        found.about |= {
            "section": self.section.name,
            "mark": self.section.mark,
            "coverage": self.coverage,
            "missing": list(self.missing),
        }
        return found


def pair(
    source: Path | str | AnnData,
    section: Path | str,
    *,
    units: str = "",
    bin_um: float | None = None,
    genes: Sequence[str] = (),
    table: str = "",
) -> Pairing:
    """Lay predictions over a section.

    Parameters
    ----------
    source
        As for `predictions.read`.
    section
        Space Ranger's ``outs``, or a patch store for maps in its order.
    units
        Of the predictions, see `evaluation.evaluate`; may be left out where the file says it.
    bin_um, table
        As for `predictions.read`.
    genes
        Leave out the others.

    Raises
    ------
    UserError
        The predictions or the section cannot be read, do not fit each other, or their unit is
        unknown.
    """
    source = predictions.read(source, bin_um, table)
    against = open_section(section)
    units = _unit(source, units)
    if source.section and against.patient and source.section != against.patient:
        raise UserError(
            f"{source.name} predicts section {source.section}, {against.name} is "
            f"{against.patient}: give both of one section"
        )
    if unknown := [gene for gene in genes if gene not in source.genes]:
        raise UserError(f"{source.name} does not predict gene {', '.join(unknown)}")
    wanted = [gene for gene in source.genes if not genes or gene in genes]
    both = predictions.matched(wanted, against.genes, source.name)
    if len(both) > MOST_GENES:
        raise UserError(
            f"{source.name} predicts {len(both)} measured genes: name at most {MOST_GENES} of them "
            "(--genes)"
        )
    missing = tuple(gene for gene in wanted if gene not in set(both))
    if isinstance(against, StoreSection):
        width = _width_in_store(source, against)
        return Pairing(source.name, against, tuple(both), missing, width, units, source)
    table_of = source if isinstance(source, Table) else _as_table(source, against)
    rows = Rows(table_of, against, tuple(both))
    found = Pairing(source.name, against, tuple(both), missing, table_of.bin_um, units, rows)
    found.findings = rows.findings()
    return found


def _unit(source: Table | Maps, units: str) -> str:
    if units and units not in UNITS:
        raise UserError(f"units are '{units}': choose among {', '.join(UNITS)}")
    if units and source.units and units != source.units:
        raise UserError(f"{source.name} says that it holds {source.units}, not {units}")
    if not (units or source.units):
        raise UserError(
            f"{source.name} does not say in which units it predicts: state them (UNITS=, --units), "
            f"one of {', '.join(UNITS)}"
        )
    return units or source.units


def _width_in_store(source: Table | Maps, section: StoreSection) -> float:
    """Width of the bins of maps that are in the order of a store."""
    if isinstance(source, Table):
        raise UserError(
            f"{source.name} counts array rows and columns, which the patch store {section.name} "
            "does not know: give Space Ranger's outs of the section instead"
        )
    n, shape = len(section.store), source.rate.shape
    sides = {PATCH_BINS: 2.0, PATCH_BINS // 4: 8.0}
    if len(shape) != 4 or shape[0] != n or shape[2] != shape[3] or shape[3] not in sides:
        raise UserError(
            f"{source.name}: maps of shape {tuple(shape)} are not those of the {n} patches of "
            f"{section.name}: give [{n}, G, 128, 128] at 2 µm, or [{n}, G, 32, 32] at 8 µm, in "
            "its order"
        )
    return sides[shape[3]]


def _as_table(source: Maps, section: OutsSection) -> Table:
    """Maps as rows of bins: those of the whole array, or patches with their places."""
    shape = tuple(source.rate.shape)
    if len(shape) == 3:
        for width, factor in ((2.0, 1), (8.0, 4)):
            if shape[1:] == tuple(-(-n // factor) for n in section.array_shape):
                return _MapRows.of(source, width, np.zeros((1, 2), int), source.rate, True)
    elif source.origin is not None and shape[2] in (PATCH_BINS, PATCH_BINS // 4):
        width = 2.0 if shape[2] == PATCH_BINS else 8.0
        return _MapRows.of(source, width, source.origin, source.rate, False)
    raise UserError(
        f"{source.name}: maps of shape {shape} have no place in {section.name}: give "
        "[G, rows, cols] of the whole array, patches of 128 x 128 bins of 2 µm (32 x 32 of 8 µm) "
        "with the array row and column of their first bin as 'origin', or score them against a "
        "patch store in its order"
    )


class _MapRows(Table):
    """A table whose values are read from maps, one patch or one row of the array at a time."""

    @classmethod
    def of(
        cls, source: Maps, bin_um: float, origin: np.ndarray, rate: Any, whole: bool
    ) -> _MapRows:
        """Rows of maps ``rate``, patches at ``origin`` or, as one, the whole array."""
        height, width = rate.shape[-2:]
        none = np.zeros(0, np.int32)
        made = cls(source.name, source.genes, none, none, bin_um, lambda *_: none, source.units)
        n = -(-height // 32) if whole else len(origin)
        object.__setattr__(made, "pieces", (origin, rate, whole, n, height, width))
        return made

    def chunks(self, columns: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        origin, rate, whole, n, height, width = self.pieces  # type: ignore[attr-defined]
        for i in range(n):
            if whole:
                top, left = 32 * i, 0
                maps = np.asarray(rate[:, top : top + 32])[columns]
            else:
                (top, left), maps = origin[i].tolist(), np.asarray(rate[i])[columns]
            values = maps.reshape(len(maps), -1).T
            rows, cols = np.indices(maps.shape[1:]).reshape(2, -1)
            known = ~np.isnan(values).all(1)
            yield rows[known] + top, cols[known] + left, values[known]


class Rows:
    """Predicted bins of a table in temporary files, one for each row of patches."""

    def __init__(self, table: Table, section: OutsSection, genes: tuple[str, ...]) -> None:
        self.name, self.factor = table.name, factor_of(table.bin_um, table.name)
        self.side = PATCH_BINS // self.factor
        self.shape = tuple(n // self.factor for n in section.tissue.shape)
        self.files = [
            [tempfile.SpooledTemporaryFile(_SPOOL_BYTES) for _ in range(2)]  # noqa: SIM115
            for _ in range(self.shape[0] // self.side)
        ]
        self.dtype: np.dtype | None = None
        self.of_maps = isinstance(table, _MapRows)  # which hold the whole array, or patch
        self.genes, self.n, self.on_grid, self.on_tissue = genes, 0, 0, 0
        self.overview = Overview(section, genes, self.factor, table.bin_um)
        tissue = section.tissue[:: self.factor, :: self.factor]
        columns = [table.genes.index(gene) for gene in genes]
        for rows, cols, values in table.chunks(columns):
            self._add(rows, cols, values, tissue)

    def _add(
        self, rows: np.ndarray, cols: np.ndarray, values: np.ndarray, tissue: np.ndarray
    ) -> None:
        self.overview.add(rows, cols, values)
        self.n += len(rows)
        kept = (rows >= 0) & (rows < self.shape[0]) & (cols >= 0) & (cols < self.shape[1])
        rows, cols, values = rows[kept], cols[kept], values[kept]
        self.on_grid += len(rows)
        self.on_tissue += int(tissue[rows, cols].sum())
        self.dtype = values.dtype
        band = rows // self.side
        order = np.argsort(band, kind="stable")
        ends = np.cumsum(np.bincount(band, minlength=len(self.files)))
        place = ((rows - band * self.side) * self.shape[1] + cols).astype(np.int32)
        for files, part in zip(self.files, np.split(order, ends[:-1]), strict=True):
            if len(part):
                files[0].write(place[part].tobytes())
                files[1].write(values[part].tobytes())

    def band(self, i: int, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """A row of patches: values [G, *shape], and which bins are predicted."""
        known = np.zeros(shape, bool)
        rate = np.zeros((len(self.genes), *shape), self.dtype or np.float32)
        for file in self.files[i]:
            file.seek(0)
        place = np.frombuffer(self.files[i][0].read(), np.int32)
        values = np.frombuffer(self.files[i][1].read(), rate.dtype).reshape(
            len(place), len(self.genes)
        )
        for file in self.files[i]:
            file.seek(0, 2)
        known.reshape(-1)[place] = True
        if known.sum() != len(place):
            twice = int(np.argmax(np.bincount(place) > 1))
            row, col = divmod(twice, shape[1])
            raise UserError(
                f"{self.name} predicts the bin in array row {row + i * self.side}, column {col} "
                "twice: keep one row for each bin"
            )
        for g, gene in enumerate(rate.reshape(len(rate), -1)):
            gene[place] = values[:, g]
        return rate, known

    def findings(self) -> list[str]:
        """What looks wrong with the places of bins."""
        said = self.overview.findings()
        if self.on_grid < self.n:
            said.append(
                f"{self.n - self.on_grid} of {self.n} predicted bins lie outside the section's "
                "array and are left out."
            )
        off = 1 - self.on_tissue / max(self.on_grid, 1)
        if off > _OFF_TISSUE and not self.of_maps:
            said.append(
                f"{off:.0%} of predicted bins lie off the tissue: are these predictions of "
                "another section?"
            )
        return said
