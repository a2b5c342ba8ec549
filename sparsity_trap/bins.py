"""Larger bins: sums of counts and masks over blocks of 2 µm bins."""

from __future__ import annotations

from typing import Any

#: Width of a native bin, µm.
BIN_UM = 2.0

#: Tokens along one side of a patch, and 2 µm bins along one side of a token and of a patch.
TOKEN_GRID, BINS_PER_TOKEN = 16, 8
PATCH_BINS = TOKEN_GRID * BINS_PER_TOKEN

#: Anything indexed by patch that NumPy understands: ndarray, Tensor, zarr.Array.
Maps = Any


def bin_sum(x: Maps, factor: int) -> Maps:
    """Sum ``factor`` x ``factor`` bins over the last two axes.

    Parameters
    ----------
    x
        ndarray or Tensor [..., H, W]; H and W are multiples of ``factor``.
    factor
        Bins along one side of the new bin; 4 takes 2 µm to 8 µm.

    Returns
    -------
    [..., H / factor, W / factor] of the same kind and floating type as ``x``; integers become
    int64 and half precision float32, so that sums do not overflow. Differentiable for tensors.
    """
    import torch  # here, so that who only asks for BIN_UM does without

    wide = torch.as_tensor(x)
    if not wide.is_floating_point():
        wide = wide.long()
    elif wide.dtype in (torch.float16, torch.bfloat16):
        wide = wide.float()
    height, width = wide.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(f"a map of {height} x {width} bins cannot be cut into {factor} x {factor}")
    if factor > 1:
        wide = wide.unflatten(-1, (-1, factor)).sum(-1).unflatten(-2, (-1, factor)).sum(-2)
    return wide if isinstance(x, torch.Tensor) else wide.numpy()


def bin_mask(mask: Maps, factor: int) -> Maps:
    """Tissue mask of larger bins: in tissue when more than half of the small bins are.

    Parameters
    ----------
    mask
        bool ndarray or Tensor [..., H, W].
    factor
        Bins along one side of the new bin.

    Returns
    -------
    bool [..., H / factor, W / factor] of the same kind as ``mask``.
    """
    return 2 * bin_sum(mask, factor) > factor * factor
