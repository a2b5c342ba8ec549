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
    # Each property of h5py asks the library anew, and a section has hundreds of datasets.
    plan, dtype, file = dataset.id.get_create_plist(), dataset.dtype, dataset.file
    filters = [plan.get_filter(i)[0] for i in range(plan.get_nfilters())]
    chunks = []
    plain = not (dtype.hasobject or file.userblock_size)
    if plain and filters in ([_DEFLATE], [_SHUFFLE, _DEFLATE]):
        length, width, shuffled = plan.get_chunk()[0], dtype.itemsize, _SHUFFLE in filters
        chunks = _chunks(dataset, length)
    if not chunks:
        return lambda start, stop: convert(_split(dataset[start:stop]))
    handle, name = file.id.get_vfd_handle(), dataset.name

    def read(start: int, stop: int) -> np.ndarray:
        tables = []
        for i in range(start // length, -(-stop // length)):
            table = _inflate(
                os.pread(handle, chunks[i].size, chunks[i].byte_offset), length * width
            )
            if table is None:
                raise OSError(f"damaged chunk of {name}")
            # The shuffle filter stores the first bytes of all entries, then all second ones, ...
            table = table.reshape(width, length) if shuffled else table.reshape(length, width).T
            tables.append(table[:, max(start - i * length, 0) : stop - i * length])
        # Converted at once, not chunk by chunk: each call would wait for Python's lock.
        return convert(joined(tables, axis=1))

    return read


def joined(parts: Sequence[np.ndarray], axis: int = 0) -> np.ndarray:
    """Arrays in one piece; a single one is not copied."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis)


def _chunks(dataset: h5py.Dataset, length: int) -> list[h5py.h5d.StoreInfo]:
    """Place of each chunk of so many entries; nothing where one is missing or not filtered."""
    found: list[h5py.h5d.StoreInfo] = []
    dataset.id.chunk_iter(found.append)
    if len(found) != -(-len(dataset) // length) or any(chunk.filter_mask for chunk in found):
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
        if dtype.kind in "iu" and width < dtype.itemsize and not low[width:].max(initial=0):
            # Several times as fast as moving all bytes to their places.
            numbers = low[width - 1].astype(small)
            for byte in reversed(range(width - 1)):
                numbers <<= 8
                numbers |= low[byte]
            return numbers
    return np.ascontiguousarray(planes.T).reshape(-1).view(dtype)
