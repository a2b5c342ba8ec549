"""The count matrix of Space Ranger (HDF5), of which one needs few genes: read in pieces.

It lists the genes of one bin after the other, bins in any order. Its entries pass by in pieces:
those of the genes asked for are kept, the rest is forgotten. Inflating and putting in order bound
the reading; both go on in threads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sparsity_trap.data.inflate import in_threads, numbers, pieces, read_all, reader
from sparsity_trap.inputs import NO_LOCKS, check_file, unreadable
from sparsity_trap.settings import UserError

if TYPE_CHECKING:
    import h5py
    import scipy.sparse as sp

_MATRIX = "a whole Space Ranger matrix, version 3"
_BARCODE = b"s_002um_RRRRR_CCCCC"
#: Datasets that are read, and how far DEFLATE unpacks at most.
_READ = ("barcodes", "data", "indices", "indptr", "features/name", "features/feature_type")
_EXPANSION = 1032
_BATCH = 100_000  # sorted entries in hand at a time
BLOCK = 400_000  # entries of one piece of work

#: What h5py, numpy and pyarrow raise when a file is damaged or laid out otherwise: one sentence for
#: all of them, which names the file.
DAMAGE = (OSError, LookupError, TypeError, ValueError, AttributeError, MemoryError)


@contextmanager
def open_matrix(path: Path) -> Iterator[h5py.Group]:
    """Open a count matrix; whatever its damage raises becomes one sentence."""
    check_present(path)
    try:
        with _open(path) as file:
            matrix = file["matrix"]
            _check_sizes(matrix, path)
            yield matrix
    except DAMAGE as error:
        if said := _other_layout(path, error):
            raise UserError(f"{path} {said}") from error
        raise unreadable(path, _MATRIX, error, own=b"\x89HDF") from error


def _open(path: Path) -> h5py.File:
    import h5py

    try:
        return h5py.File(path)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return h5py.File(path, locking=False)


def _check_sizes(matrix: h5py.Group, path: Path) -> None:
    """Raise ``ValueError`` where a damaged header asks for more memory than the file can fill."""
    most = _EXPANSION * path.stat().st_size
    for name in _READ:
        column = matrix[name]
        entries = max(column.size, *(column.chunks or (0,)))
        if entries * column.dtype.itemsize > most:
            raise ValueError(f"{name} claims {entries} entries")


def _other_layout(path: Path, error: Exception) -> str:
    """What a sound HDF5 file holds that cannot be read here, and what helps; else nothing."""
    import h5py

    try:
        with _open(path) as file:
            if "matrix" not in file:
                kind = "is an AnnData table" if "obs" in file else "holds " + ", ".join(file)
                return (
                    f"{kind} and no group 'matrix': give filtered_feature_bc_matrix.h5 of Space "
                    "Ranger 3 or later, which is of version 3"
                )
            foreign: list[str] = []

            def look(name: str, item: h5py.Dataset | h5py.Group) -> None:
                if not isinstance(item, h5py.Dataset):
                    return
                plan = item.id.get_create_plist()
                for i in range(plan.get_nfilters()):
                    number, _, _, said = plan.get_filter(i)
                    if not h5py.h5z.filter_avail(number):
                        foreign.append(f"{name} with filter {number} {said.decode()}".strip())

            file["matrix"].visititems(look)
    except (*DAMAGE, RuntimeError):
        return ""
    if foreign and isinstance(error, OSError):
        return (
            f"compresses {', '.join(foreign)}, for which HDF5 finds no plugin: write it again with "
            "gzip (h5repack -f GZIP=4), or set HDF5_PLUGIN_PATH to the folder of the plugin"
        )
    if absent := re.search(r"object '(.+?)' doesn't exist", str(error)):
        return (
            f"has no {absent[1]} in the group 'matrix': give the file of version 3 as Space Ranger "
            "wrote it"
        )
    return ""


def check_present(path: Path) -> None:
    """Raise ``UserError`` where a file of Space Ranger's output is missing or may not be read."""
    check_file(path, f"unpack {path.parent.name} of this run again, wholly")


def read_features(path: Path) -> list[str | None]:
    """Symbol of each feature; None for features that are not genes, such as antibodies."""
    with open_matrix(path) as matrix:
        features = matrix["features"]
        return [
            name.decode().strip() if kind.strip() == b"Gene Expression" else None
            for name, kind in zip(features["name"][:], features["feature_type"][:], strict=True)
        ]


def read_genes(
    path: Path, genes: Sequence[str], shape: tuple[int, int], block: int = BLOCK
) -> sp.csc_array:
    """Read the counts of some genes; see :func:`sparsity_trap.data.spaceranger.read_counts`.

    ``shape`` is that of the array of bins.
    """
    names = read_features(path)
    if missing := [gene for gene in genes if gene not in set(names)]:
        from sparsity_trap.data.genes import near_symbols

        raise UserError(
            f"{path} has no gene {', '.join(missing)}{near_symbols(missing, names)}: use a matrix "
            "of the human transcriptome with gene symbols, or take the gene out of the panel (key "
            "genes.panel)"
        )
    place: dict[str | None, int] = {gene: column for column, gene in enumerate(genes)}
    # The narrower, the faster columns are sorted.
    dtype = np.int8 if len(genes) < 128 else np.int16
    column_of = np.array([place.get(name, -1) for name in names], dtype)
    with open_matrix(path) as matrix:
        bins = bins_of_barcodes(matrix["barcodes"], shape, path)
        parts = list(_pieces_by_gene(matrix, bins, column_of, len(genes), path, block))
    return _assemble(parts, len(genes), shape, path)


def read_all_genes(
    path: Path, shape: tuple[int, int]
) -> tuple[np.ndarray, sp.csr_array, list[str]]:
    """Read the counts of all genes at 2 µm.

    Returns
    -------
    Bin number of each row; counts (csr) ``[bins, genes]``, uint16, where a gene that several
    features name has as many entries; symbols, each once.
    """
    import scipy.sparse as sp

    names = read_features(path)
    genes = list(dict.fromkeys(name for name in names if name is not None))
    place: dict[str | None, int] = {gene: column for column, gene in enumerate(genes)}
    # What is no gene goes to a last column, which is then cut off.
    column_of = np.array([place.get(name, len(genes)) for name in names], np.int32)
    with open_matrix(path) as matrix:
        bins = bins_of_barcodes(matrix["barcodes"], shape, path)
        counts = _small(read_all(matrix["data"], BLOCK), path)
        indices = matrix["indices"]

        def columns(planes: np.ndarray) -> np.ndarray:
            return column_of.take(_whole(numbers(planes, indices.dtype), path))

        column = read_all(indices, BLOCK, columns)
        # Of the type of the columns where that holds them, or SciPy would convert these.
        indptr = _pointers(matrix, len(bins), path).astype(_index_type(len(column)))
        others = None in names
        table = sp.csr_array((counts, column, indptr), shape=(len(bins), len(genes) + others))
    return bins, table[:, : len(genes)] if others else table, genes


def read_depth(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Number of genes with a count in each bin, int32 ``[rows, cols]``; -1 for one not listed."""
    depth = np.full(shape[0] * shape[1], -1, np.int32)
    with open_matrix(path) as matrix:
        bins = bins_of_barcodes(matrix["barcodes"], shape, path)
        depth[bins] = np.diff(read_all(matrix["indptr"], BLOCK).astype(np.int64))
    return depth.reshape(shape)


def check_counts(values: np.ndarray, path: Path) -> np.ndarray:
    """Return values that are counts; ``UserError`` where one is negative, fractional or NaN."""
    if values.dtype.kind == "u" or not values.size:
        return values
    bad = values < 0
    if values.dtype.kind == "f":
        bad |= ~np.isfinite(values) | (values != np.floor(values))
    if bad.any():
        raise UserError(
            f"{path} holds {values[bad][0]:g}, which is not a count: give the raw UMI matrix of "
            "Space Ranger, not normalised or log-transformed values"
        )
    return values


def _whole(values: np.ndarray, path: Path) -> np.ndarray:
    """Indices as whole numbers: R writes them as real ones."""
    if values.dtype.kind in "iu":
        return values
    whole = values.astype(np.int64)
    if not np.array_equal(whole, values):
        raise UserError(f"{path}: its indices are not whole numbers: give Space Ranger's own file")
    return whole


def _pointers(matrix: h5py.Group, n_bins: int, path: Path) -> np.ndarray:
    """Where the entries of each bin begin and end; checks that they fit the other columns."""
    indptr = _whole(read_all(matrix["indptr"], BLOCK), path)
    fits = len(indptr) == n_bins + 1 and not (indptr[1:] < indptr[:-1]).any()
    if not fits or {len(matrix["indices"]), len(matrix["data"])} != {int(indptr[-1])}:
        raise UserError(f"{path}: indptr does not fit barcodes and data; copy it again")
    return indptr


def in_order(bins: np.ndarray, values: np.ndarray, path: Path) -> int:
    """Sort entries by their bin and add up those of one bin, in place.

    Parameters
    ----------
    bins, values
        int32, not negative, and uint16; changed. Zeros are dropped.
    path
        File they come from.

    Returns
    -------
    Number of entries that remain; they stand at the start of both arrays.

    Raises
    ------
    UserError
        A sum is above 65535.
    """
    if not len(bins):
        return 0
    # Bin and value in one number: numpy sorts plain numbers many at a time, without other memory.
    # Nearly always both fit into 32 bits, which takes half as long as 64.
    bits = min(32 - int(bins.max()).bit_length(), 16)
    keys = bins.view(np.uint32)
    if int(values.max()).bit_length() > bits:
        keys, bits = bins.astype(np.uint64), 16
    keys <<= bits
    keys |= values
    keys.sort()
    size, value = 0, 2**bits - 1
    for part in np.array_split(keys, len(keys) // _BATCH + 1):
        part = part.compress(part & value > 0)  # a copy: it may be written where it was read
        place = slice(size, size + len(part))
        np.right_shift(part, bits, out=bins[place], casting="unsafe")
        np.bitwise_and(part, value, out=values[place], casting="unsafe")
        size += len(part)
    again = bins[1:size] == bins[: size - 1]
    if again.any():
        first = np.flatnonzero(np.concatenate([[True], ~again]))
        sums = _small(np.add.reduceat(values[:size], first, dtype=np.int64), path)
        bins[: len(sums)], values[: len(sums)] = bins[first], sums
        size = len(sums)
    return size


def _pieces_by_gene(
    matrix: h5py.Group,
    bins: np.ndarray,
    column_of: np.ndarray,
    n_genes: int,
    path: Path,
    block: int,
) -> Iterator[tuple[np.ndarray, np.ndarray, list[int]]]:
    """Entries of some genes, piece by piece: bins, counts, and where each gene begins and ends."""
    indptr = _pointers(matrix, len(bins), path)
    indices, data = matrix["indices"], matrix["data"]
    read_index, read_value = reader(indices), reader(data)

    def work(start: int, stop: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        column = column_of.take(_whole(read_index(start, stop), path))
        kept = np.flatnonzero(column >= 0)
        column = column.take(kept)
        kept = kept.take(np.argsort(column, kind="stable"))
        value = _small(read_value(start, stop).take(kept), path)
        # Of one type, or the search would convert all pointers.
        first = np.searchsorted(indptr, indptr.dtype.type(start), "right") - 1
        last = np.searchsorted(indptr, indptr.dtype.type(stop))
        ends = indptr[first : last + 1].clip(start, stop)
        bin_ = np.repeat(bins[first:last], np.diff(ends)).take(kept)
        ends = np.cumsum(np.bincount(column, minlength=n_genes))
        return bin_, value, [0, *ends.tolist()]

    yield from in_threads(partial(work, *piece) for piece in pieces(indices, block))


def _assemble(
    parts: Sequence[tuple[np.ndarray, np.ndarray, list[int]]],
    n_genes: int,
    shape: tuple[int, int],
    path: Path,
) -> sp.csc_array:
    """Put the entries of each gene together and in order.

    In threads, and where they will stay: memory is slow when it is first touched.
    """
    import scipy.sparse as sp

    lengths = np.diff([ends for _, _, ends in parts]).sum(0)
    starts = np.cumsum([0, *lengths]).tolist()
    bins, values = np.empty(starts[-1], np.int32), np.empty(starts[-1], np.uint16)

    def column(i: int) -> int:
        place = slice(starts[i], starts[i + 1])
        np.concatenate([b[e[i] : e[i + 1]] for b, _, e in parts], out=bins[place])
        np.concatenate([v[e[i] : e[i + 1]] for _, v, e in parts], out=values[place])
        return in_order(bins[place], values[place], path)

    # Entries that were added up leave gaps, which are closed from the left.
    ends = [0]
    sizes = in_threads(partial(column, i) for i in range(n_genes))
    for start, size in zip(starts, sizes, strict=False):
        for array in (bins, values):
            array[ends[-1] : ends[-1] + size] = array[start : start + size]
        ends.append(ends[-1] + size)
    indptr = np.array(ends, _index_type(starts[-1]))
    arrays = values[: ends[-1]], bins[: ends[-1]], indptr
    return sp.csc_array(arrays, shape=(shape[0] * shape[1], n_genes))


def _index_type(entries: int) -> type[np.signedinteger]:
    return np.int32 if entries < 2**31 else np.int64


def bins_of_barcodes(barcodes: h5py.Dataset, shape: tuple[int, int], path: Path) -> np.ndarray:
    """Bin number (row * cols + col, int32) of each barcode."""
    listed = np.zeros(shape[0] * shape[1], bool)

    def convert(text: np.ndarray) -> np.ndarray:
        """Bins of barcodes whose characters are ``[width, barcodes]``."""
        width = len(_BARCODE)
        if len(text) < width:
            text = np.pad(text, ((0, width - len(text)), (0, 0)))
        fixed = text[[*range(8), 13]] != np.frombuffer(_BARCODE, np.uint8)[[*range(8), 13], None]
        digits = text[[*range(8, 13), *range(14, 19)]] - np.uint8(ord("0"))
        if fixed.any() or digits.max(initial=0) > 9:
            wrong = fixed.any(0) | (digits > 9).any(0)
            barcode = bytes(text[:, wrong.argmax()]).rstrip(b"\0").decode(errors="replace")
            raise UserError(
                f"{path}: barcode {barcode} is not that of a 2 µm bin "
                f"(s_002um_00000_00000-1): give the one in square_002um"
            )
        # Two digits at a time, which a byte holds.
        pairs = digits.reshape(2, 5, -1)[:, 1::2] * np.uint8(10)
        pairs += digits.reshape(2, 5, -1)[:, 2::2]
        row, col = digits[::5].astype(np.int32)
        for number, (hundreds, ones) in zip((row, col), pairs, strict=True):
            number *= 100
            number += hundreds
            number *= 100
            number += ones
        if row.max(initial=0) >= shape[0] or col.max(initial=0) >= shape[1]:
            raise UserError(
                f"{path}: a barcode lies outside the grid of {shape[0]} x {shape[1]} bins in "
                "tissue_positions.parquet: give both files of the same section"
            )
        row *= shape[1]
        row += col
        listed[row.astype(np.intp)] = True  # faster than numpy's own conversion
        return row

    bins = read_all(barcodes, BLOCK, convert)
    if listed.sum() != len(bins):
        raise UserError(f"{path} lists a barcode twice: give Space Ranger's own file")
    return bins


def _small(values: np.ndarray, path: Path) -> np.ndarray:
    """Counts as uint16; checks them."""
    check_counts(values, path)
    if values.size and values.max() > np.iinfo(np.uint16).max:
        raise UserError(
            f"{path}: a bin holds {values.max()} counts of one gene, above 65535; give the raw "
            "2 µm UMI matrix, not scaled values"
        )
    return values.astype(np.uint16, copy=False)
