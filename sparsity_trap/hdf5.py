"""Long columns of HDF5 files, inflated in threads.

h5py inflates with zlib, in one thread, under a lock that halts all others. Here compressed chunks
are read as they lie in the file and inflated by libdeflate, in whatever thread asks for them.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import h5py

_Result = TypeVar("_Result")

THREADS = min(4, os.cpu_count() or 1)
_DEFLATE, _SHUFFLE = 1, 2  # filter numbers of HDF5


def in_threads(tasks: Iterable[Callable[[], _Result]]) -> Iterator[_Result]:
    """Yield the results of tasks in their order; only a few wait to be taken."""
    with ThreadPoolExecutor(THREADS) as threads:
        waiting: deque[Future[_Result]] = deque()
        for task in tasks:
            waiting.append(threads.submit(task))
            if len(waiting) > THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def pieces(dataset: h5py.Dataset, entries: int) -> Iterator[tuple[int, int]]:
    """Start and stop of successive pieces of about so many entries; an empty dataset has one.

    They are whole chunks, so that none is inflated twice.
    """
    chunk = dataset.chunks[0] if dataset.chunks else 1
    step = max(entries // chunk, 1) * chunk
    for start in range(0, max(len(dataset), 1), step):
        yield start, min(start + step, len(dataset))


def read_all(
    dataset: h5py.Dataset, entries: int, convert: Callable[[np.ndarray], np.ndarray] | None = None
) -> np.ndarray:
    """Read a dataset whole, in threads; ``convert`` as for :func:`reader`."""
    read = reader(dataset, convert)
    return joined(list(in_threads(partial(read, *piece) for piece in pieces(dataset, entries))))


def reader(
    dataset: h5py.Dataset, convert: Callable[[np.ndarray], np.ndarray] | None = None
) -> Callable[[int, int], np.ndarray]:
    """Function of ``start`` and ``stop`` that reads these entries, in any thread.

    Parameters
    ----------
    dataset
        One-dimensional; its file must stay open.
    convert
        Makes the entries from their bytes, uint8 ``[itemsize, entries]``. Default: the numbers they
        are, as uint16 or uint32 where that holds them all.

    Raises
    ------
    OSError
        From the function: the file is damaged.
    """
    convert = convert or partial(numbers, dtype=dataset.dtype)
    chunks = _chunks(dataset)
    if not chunks:
        return lambda start, stop: convert(_split(dataset[start:stop]))
    file, name, shuffled = dataset.file.id.get_vfd_handle(), dataset.name, dataset.shuffle
    length, width = dataset.chunks[0], dataset.dtype.itemsize

    def read(start: int, stop: int) -> np.ndarray:
        parts = []
        for i in range(start // length, -(-stop // length)):
            table = _inflate(os.pread(file, chunks[i].size, chunks[i].byte_offset), length * width)
            if table is None:
                raise OSError(f"damaged chunk of {name}")
            # The shuffle filter stores the first bytes of all entries, then all second ones, ...
            table = table.reshape(width, length) if shuffled else table.reshape(length, width).T
            parts.append(convert(table[:, max(start - i * length, 0) : stop - i * length]))
        return joined(parts)

    return read


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays in one piece; a single one is not copied."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _chunks(dataset: h5py.Dataset) -> list[h5py.h5d.StoreInfo]:
    """Place of each chunk where we can inflate them all ourselves, else nothing."""
    plan = dataset.id.get_create_plist()
    filters = [plan.get_filter(i)[0] for i in range(plan.get_nfilters())]
    if (
        filters not in ([_DEFLATE], [_SHUFFLE, _DEFLATE])
        or dataset.dtype.hasobject
        or dataset.file.userblock_size
    ):
        return []
    found: list[h5py.h5d.StoreInfo] = []
    dataset.id.chunk_iter(found.append)
    whole = len(found) == -(-len(dataset) // dataset.chunks[0])
    if not whole or any(chunk.filter_mask for chunk in found):
        return []
    return sorted(found, key=lambda chunk: chunk.chunk_offset)


def _inflate(chunk: bytes, size: int) -> np.ndarray | None:
    """The ``size`` bytes of a compressed chunk; None where it does not hold them."""
    import imagecodecs  # its inflater takes a half to a third of the time of zlib's

    try:
        raw = imagecodecs.deflate_decode(chunk, out=size)
    except RuntimeError:
        return None
    return np.frombuffer(raw, np.uint8) if len(raw) == size else None


def _split(values: np.ndarray) -> np.ndarray:
    """Bytes ``[itemsize, entries]`` of an array."""
    if values.dtype.hasobject:
        values = values.astype("S")
    return np.ascontiguousarray(values).view(np.uint8).reshape(len(values), values.itemsize).T


def numbers(planes: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Numbers from their bytes ``[itemsize, entries]``; uint16 or uint32 where that holds them."""
    low = planes if dtype.str[0] == "<" else planes[::-1]
    for small in (np.uint16, np.uint32):
        width = np.dtype(small).itemsize
        if dtype.kind in "iu" and width < dtype.itemsize and not low[width:].any():
            # Several times as fast as moving all bytes to their places.
            numbers = low[0].astype(small)
            for byte in range(1, width):
                numbers |= low[byte].astype(small) << 8 * byte
            return numbers
    return np.ascontiguousarray(planes.T).reshape(-1).view(dtype)
