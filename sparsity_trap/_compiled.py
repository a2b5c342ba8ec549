"""How the loops are compiled: sums may be reordered, and Python's lock is released.

What was compiled is kept beside the source or, where that may not be written, in the user's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from numba import njit


def compiled(function: Callable) -> Callable:
    """Compile a loop at its first call; in every process anew where nothing may be written."""
    with_options = partial(njit, nogil=True, fastmath={"reassoc", "contract"}, error_model="numpy")
    try:
        return with_options(cache=True)(function)
    except RuntimeError:  # in another user's installation, for an account without a home
        return with_options()(function)
