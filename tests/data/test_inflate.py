"""Parts of HDF5 datasets against h5py."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

from sparsity_trap.data.inflate import read_all, reader


@pytest.mark.parametrize("layout", [{"shuffle": True, "compression": "gzip"}, {}])
@pytest.mark.parametrize(
    ("dtype", "largest"),
    [(d, n) for d in ("<i8", ">i8", "<u4", ">i4", "<i2", "u1") for n in (100, 70_000, 2**40)
     if n <= np.iinfo(d).max] + [("<f4", 1), ("<i4", -3)],
)  # fmt: skip
def test_parts_of_a_dataset_equal_h5py(tmp_path, dtype, largest, layout):
    values = (np.random.default_rng(7).random(1000) * largest).astype(dtype)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("a", data=values, chunks=(64,), **layout)
    with h5py.File(tmp_path / "a.h5") as file:
        read = reader(file["a"])
        for start, stop in ((0, 1000), (64, 128), (70, 75), (60, 200), (999, 1000), (5, 5)):
            assert np.array_equal(read(start, stop), file["a"][start:stop])
        assert np.array_equal(read_all(file["a"], 100), values)
