"""The counts of a simulated section, in the file that Space Ranger writes."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from sparsity_trap.settings import SIMULATION


def barcodes(rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """Space Ranger barcodes of 2 µm bins, as bytes."""
    text = np.char.add(np.char.mod(b"s_002um_%05d_", rows), np.char.mod(b"%05d-1", cols))
    return text.astype("S21")


def write_matrix(
    path: Path,
    genes: list[str],
    columns: np.ndarray,
    data: np.ndarray,
    indices: np.ndarray,
    indptr: np.ndarray,
) -> None:
    """Write a feature-barcode matrix (Cell Ranger v3), of bins or cells by name in ``columns``."""
    panel = len(genes)
    features = {
        # Symbols, not Ensembl identifiers: nothing real is claimed of a simulated feature.
        "id": genes,
        "name": genes,
        "feature_type": ["Gene Expression"] * panel,
        "genome": ["GRCh38"] * panel,
        "_all_tag_keys": ["genome"],
    }
    with h5py.File(path, "w") as file:
        file.attrs["filetype"] = "matrix"
        file.attrs["version"] = 2
        file.attrs["software_version"] = SIMULATION
        file.attrs["chemistry_description"] = "Visium HD v1"
        group = file.create_group("matrix")

        def store(parent: h5py.Group, name: str, values: np.ndarray) -> None:
            chunks = (min(max(len(values), 1), 80_000),)
            parent.create_dataset(
                name, data=values, chunks=chunks, maxshape=(None,), compression="gzip", shuffle=True
            )

        store(group, "barcodes", columns)
        store(group, "data", data)
        store(group, "indices", indices)
        store(group, "indptr", indptr)
        store(group, "shape", np.array([panel, len(columns)], np.int32))
        inner = group.create_group("features")
        for name, values in features.items():
            store(inner, name, np.array(values, dtype=bytes))
