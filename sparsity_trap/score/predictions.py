"""Predictions as files: AnnData and SpatialData by bin, zarr and npz as maps.

What is read of a table are its positions, its genes and, in chunks of rows, its values. So a table
of a whole section at 2 µm is never in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsity_trap.bins import BIN_UM
from sparsity_trap.settings import UserError

if TYPE_CHECKING:
    from anndata import AnnData

_CHUNK = 2**23  # values in hand at a time
_BARCODES = 2**18

#: What the project's own tables say of their unit.
_OWN_UNIT = "expected UMI count per bin"

#: Names under which a file of maps may keep them.
_MAPS = ("rate", "prediction", "predictions")


@dataclass(frozen=True)
class Table:
    """Predictions by bin of Space Ranger's array, in any order.

    Attributes
    ----------
    name
        The file, for errors.
    genes
        Symbols.
    rows, cols
        int32 [n], in bins of ``bin_um``.
    bin_um
        Width of a bin.
    values
        Gives rows [start, stop) as an array [n, genes].
    units, section
        What the file itself says of its unit and of its section, else "".
    """

    name: str
    genes: tuple[str, ...]
    rows: np.ndarray
    cols: np.ndarray
    bin_um: float
    values: Callable[[int, int], np.ndarray]
    units: str = ""
    section: str = ""

    def chunks(self, columns: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Rows, columns and values [n, len(columns)] of some bins at a time."""
        step = max(_CHUNK // max(len(self.genes), 1), 1)
        for start in range(0, len(self.rows), step):
            part = slice(start, min(start + step, len(self.rows)))
            try:
                values = self.values(part.start, part.stop)
            except (OSError, LookupError, RuntimeError, TypeError, ValueError) as error:
                raise UserError(
                    f"{self.name}: X cannot be read ({' '.join(str(error).split())[:200]}): copy "
                    "the file again"
                ) from error
            yield self.rows[part], self.cols[part], values[:, columns]


@dataclass(frozen=True)
class Maps:
    """Predictions as maps.

    Attributes
    ----------
    name, genes, units
        As of `Table`.
    rate
        [N, G, h, w], patches; or [G, rows, cols], the whole array.
    origin
        [N, 2] array row and column of each patch's first bin, in bins as wide as the maps'; None
        for patches in the order of a store.
    """

    name: str
    genes: tuple[str, ...]
    rate: Any
    origin: np.ndarray | None = None
    units: str = ""
    section: str = ""


def read(
    source: Path | str | AnnData, bin_um: float | None = None, table: str = ""
) -> Table | Maps:
    """Open predictions.

    Parameters
    ----------
    source
        ``.h5ad``; a ``.zarr`` folder with AnnData, SpatialData or maps; ``.npz`` with maps; or an
        AnnData in memory, a view or backed.
    bin_um
        Width of a table's bins, where neither its barcodes nor its scale factors say.
    table
        Name of the table, where a SpatialData has several.

    Raises
    ------
    UserError
        The file is missing, of another kind, or damaged; genes occur twice; positions or the width
        of bins are unknown.
    """
    if hasattr(source, "obs_names"):
        return _of_anndata(source, "the AnnData", bin_um)
    path = Path(source)
    if not path.exists():
        raise UserError(f"{path} does not exist: give a file of predictions")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as held:
                return _of_maps({name: held[name] for name in held.files}, path)
        if path.is_dir():
            return _of_zarr(path, bin_um, table)
        return _of_h5ad(path, bin_um)
    except UserError:
        raise
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"{path} cannot be read as predictions ({problem}): give AnnData (.h5ad, .zarr), "
            "SpatialData (.zarr), or maps (.zarr, .npz)"
        ) from error


def matched(predicted: Sequence[str], measured: Sequence[str], name: str) -> list[str]:
    """Genes that were both predicted and measured, in the order of the prediction."""
    known = set(measured)
    both = [gene for gene in predicted if gene in known]
    if not both:
        raise UserError(
            f"{name} and the section share no gene: the first names are {predicted[0]} and "
            f"{measured[0]}; name predicted genes by symbol"
        )
    return both


# --- kinds of files -------------------------------------------------------------------------------


def _of_h5ad(path: Path, bin_um: float | None) -> Table:
    import anndata
    import h5py

    file = h5py.File(path)
    if not isinstance(file.get("obs"), h5py.Group) or not isinstance(file.get("var"), h5py.Group):
        # As anndata wrote it before 0.7: tables are arrays of records.
        file.close()
        return _of_anndata(anndata.read_h5ad(path), str(path), bin_um)
    return _of_group(file, str(path), bin_um)


def _of_zarr(path: Path, bin_um: float | None, table: str) -> Table | Maps:
    import zarr

    group = zarr.open_group(path, mode="r")
    if "tables" in group:
        names = sorted(group["tables"].group_keys())
        if (table or len(names) != 1) and table not in names:
            raise UserError(
                f"{path} has the tables {', '.join(names) or '(none)'}: name one of them (--table)"
            )
        return _of_group(group["tables"][table or names[0]], f"{path}, {table or names[0]}", bin_um)
    if "obs" in group and "X" in group:
        return _of_group(group, str(path), bin_um)
    held: dict[str, Any] = {name: group[name] for name in group.array_keys()}
    genes = group.attrs.get("genes")
    return _of_maps(held | ({"genes": np.array(genes)} if genes else {}), path)


def _of_maps(held: dict[str, Any], path: Path) -> Maps:
    """Maps of a file, or of a run's own folder, whose genes stand beside it."""
    name = next((key for key in _MAPS if key in held), None)
    if name is None:
        raise UserError(
            f"{path} holds {', '.join(held) or 'nothing'}: keep maps [N, G, rows, cols] as 'rate' "
            "and symbols as 'genes'"
        )
    beside = path.parent / "genes.parquet"
    units = ""
    if "genes" not in held and beside.is_file():
        import pandas as pd

        held["genes"], units = pd.read_parquet(beside, columns=["gene"])["gene"], "counts"
    if "genes" not in held:
        raise UserError(f"{path} does not name its genes: keep their symbols as 'genes'")
    genes = _unique([str(gene) for gene in np.asarray(held["genes"])], str(path))
    rate = held[name]
    axis = {4: 1, 3: 0}.get(rate.ndim)
    if axis is None or rate.shape[axis] != len(genes):
        raise UserError(
            f"{path}: maps of shape {rate.shape} do not fit {len(genes)} genes: give "
            "[N, G, rows, cols], or [G, rows, cols] for the whole array"
        )
    origin = np.asarray(held["origin"]) if "origin" in held else None
    if origin is not None and origin.shape != (rate.shape[0], 2):
        raise UserError(f"{path}: origin of shape {origin.shape} is not one place for each patch")
    return Maps(str(path), genes, rate, origin, units)


def _of_group(group: Any, name: str, bin_um: float | None) -> Table:
    """A table by the groups of its file, of HDF5 or zarr: only what is needed of it."""
    import anndata

    genes = anndata.io.read_elem(group["var"]).index
    obs = group["obs"]
    index = obs[obs.attrs["_index"]]
    places = None
    if "array_row" in obs and "array_col" in obs:
        places = tuple(np.asarray(obs[key][:]) for key in ("array_row", "array_col"))
    own = group["uns"]["sparsity_trap"] if "sparsity_trap" in group.get("uns", {}) else {}
    said = {key: _text(own[key]) for key in ("unit", "section") if key in own}
    spatial = group["uns"]["spatial"] if "spatial" in group.get("uns", {}) else {}
    widths = [
        float(np.asarray(spatial[lib]["scalefactors"]["bin_size_um"][()]))
        for lib in spatial
        if "bin_size_um" in spatial[lib].get("scalefactors", {})
    ]
    values = _reader(group["X"] if hasattr(group["X"], "dtype") else _sparse(group["X"]))
    return _table(
        name, genes, index, places, bin_um or (widths[0] if widths else None), values, said
    )


def _of_anndata(adata: AnnData, name: str, bin_um: float | None) -> Table:
    places = None
    if {"array_row", "array_col"} <= set(adata.obs):
        places = tuple(adata.obs[key].to_numpy() for key in ("array_row", "array_col"))
    own = adata.uns.get("sparsity_trap", {})
    said = {key: str(own[key]) for key in ("unit", "section") if key in own}
    widths = [
        float(library["scalefactors"]["bin_size_um"])
        for library in adata.uns.get("spatial", {}).values()
        if "bin_size_um" in library.get("scalefactors", {})
    ]
    if adata.X is None:
        raise UserError(f"{name} has no X: put the predictions there")
    width = bin_um or (widths[0] if widths else None)
    return _table(
        name, adata.var_names, np.asarray(adata.obs_names), places, width, _reader(adata.X), said
    )


def _table(
    name: str,
    genes: Any,
    index: Any,
    places: tuple[np.ndarray, ...] | None,
    bin_um: float | None,
    values: Callable[[int, int], np.ndarray],
    said: dict[str, str],
) -> Table:
    first = _parsed(index[:1], name, must=places is None)
    if places is None:
        size = index.shape[0]
        parts = [
            _parsed(index[start : start + _BARCODES], name) for start in range(0, size, _BARCODES)
        ]
        widths, *found = zip(*(part for part in parts if part), strict=True)
        if len(set(widths)) > 1:
            raise UserError(f"{name} mixes bins of several widths: give those of one")
        places = tuple(np.concatenate(part) for part in found)
    width = bin_um or (first[0] if first else None)
    if first and bin_um and first[0] != bin_um:
        raise UserError(
            f"{name}: barcodes name bins of {first[0]:g} µm, where {bin_um:g} µm is stated: give "
            "one of them"
        )
    if width not in (BIN_UM, 4 * BIN_UM):
        raise UserError(
            f"{name}: bins are {'of unknown width' if width is None else f'{width:g} µm wide'}: "
            "give a table of 2 or 8 µm, and say which (--bin-um) where its barcodes do not"
        )
    for place in places:
        if place.dtype.kind not in "iu" and not np.array_equal(place, np.floor(place)):
            raise UserError(f"{name}: array_row or array_col is not a whole number everywhere")
    units = "counts" if said.get("unit") == _OWN_UNIT else ""
    rows, cols = (np.asarray(place).astype(np.int32) for place in places)
    symbols = _unique([str(gene) for gene in genes], name)
    return Table(name, symbols, rows, cols, float(width), values, units, said.get("section", ""))


def _unique(genes: list[str], name: str) -> tuple[str, ...]:
    if not genes:
        raise UserError(f"{name} holds no gene: give a table with predictions")
    twice = [gene for gene, n in Counter(genes).items() if n > 1]
    if twice:
        raise UserError(f"{name} predicts gene {twice[0]} twice: keep one column for each symbol")
    return tuple(genes)


def _sparse(group: Any) -> Any:
    import anndata

    return anndata.io.sparse_dataset(group)


def _reader(values: Any) -> Callable[[int, int], np.ndarray]:
    """Rows of a matrix, dense or sparse, in memory or on disk; floats as they are stored."""
    if getattr(values, "format", "") == "csc":
        # Columns on disk cannot be read by rows: sparse, it fits into memory.
        values = (values.to_memory() if hasattr(values, "to_memory") else values).tocsr()

    def read_rows(start: int, stop: int) -> np.ndarray:
        part = values[start:stop]
        part = np.asarray(part.toarray() if hasattr(part, "toarray") else part)
        return part if part.dtype in (np.float16, np.float32) else part.astype(np.float32)

    return read_rows


def _parsed(
    barcodes: Any, name: str, must: bool = True
) -> tuple[float, np.ndarray, np.ndarray] | None:
    """Width of bins, rows and columns that barcodes such as s_008um_00012_00034-1 name."""
    try:
        text = np.asarray(barcodes, dtype=object).astype("S")
    except UnicodeEncodeError:
        text = np.array([b""])
    letters = text.view(np.uint8).reshape(len(text), -1)
    shape = letters[:, :19] if letters.shape[1] >= 19 else np.zeros((len(text), 19), np.uint8)
    places = [*range(2, 5), *range(8, 13), *range(14, 19)]
    digits = shape[:, places].astype(np.int32) - ord("0")
    fixed = shape[:, [0, 1, 5, 6, 7, 13]] == np.frombuffer(b"s_um__", np.uint8)
    right = fixed.all(1) & ((digits >= 0) & (digits <= 9)).all(1)
    if not right.all():
        if not must:
            return None
        odd = text[~right][0].decode(errors="replace")
        raise UserError(
            f"{name}: '{odd}' is not the barcode of a bin (s_008um_00012_00034-1): name bins as "
            "Space Ranger does, or add array_row and array_col to obs"
        )
    width = digits[:, :3] @ [100, 10, 1]
    if len(set(width)) > 1:
        raise UserError(f"{name} mixes bins of several widths: give those of one")
    tens = 10 ** np.arange(4, -1, -1)
    return float(width[0]), digits[:, 3:8] @ tens, digits[:, 8:] @ tens


def _text(value: Any) -> str:
    """A string of HDF5 or zarr."""
    found = value[()]
    return found.decode() if isinstance(found, bytes) else str(found)
