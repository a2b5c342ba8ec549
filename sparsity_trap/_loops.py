"""Compiled loops behind the scores on a CPU: every sum of one map while it stays in the cache.

Imported by ``metrics`` only when maps on a CPU are scored, since importing numba takes a second.
The first call ever compiles for some seconds; the result is kept beside this file. Threads are
the caller's: the loops release Python's lock. Sums may be reordered ("reassoc") so that they
vectorise; NaN and infinity keep their meaning.
"""

from __future__ import annotations

import numpy as np

from sparsity_trap._compiled import compiled


@compiled
def moments(x, y, inside, out):
    """Write bins, means and centred sums of x and y [H, W] to ``out`` [6].

    Of the bins where ``inside`` [H, W] is 1, not 0: weights vectorise better than truth values.
    """
    out[:] = 0
    height, width = x.shape
    first = 0
    while first < inside.size and inside.flat[first] == 0:
        first += 1
    if first == inside.size:
        return
    # Centring on the first value, then on the mean, leaves exact zeros of a constant.
    first_x, first_y = x.flat[first], y.flat[first]
    n = sum_x = sum_y = 0.0
    for i in range(height):
        for j in range(width):
            n += inside[i, j]
            sum_x += (x[i, j] - first_x) * inside[i, j]
            sum_y += (y[i, j] - first_y) * inside[i, j]
    mean_x, mean_y = sum_x / n, sum_y / n
    xx = yy = xy = 0.0
    for i in range(height):
        for j in range(width):
            dx = (x[i, j] - first_x - mean_x) * inside[i, j]
            dy = (y[i, j] - first_y - mean_y) * inside[i, j]
            xx += dx * dx
            yy += dy * dy
            xy += dx * dy
    out[0] = n
    out[1] = first_x + mean_x
    out[2] = first_y + mean_y
    out[3] = xx
    out[4] = yy
    out[5] = xy


@compiled
def poisson(count, rate, level, mask, floor, found, out, histogram):
    """Write the fields of ``metrics.PoissonSums`` to ``out`` [6] and add to ``histogram``.

    Bins with a count are first listed in ``found`` [H * W], without a branch that the processor
    would have to guess.
    """
    height, width = count.shape
    n = n_found = 0
    rates = 0.0
    for i in range(height):
        for j in range(width):
            if mask[i, j]:
                n += 1
                histogram[0, level[i, j]] += 1
                found[n_found] = i * width + j
                n_found += count[i, j] > 0
        for j in range(width):
            if mask[i, j]:
                rates += max(rate[i, j], floor) if rate[i, j] >= 0 else np.nan
    counts = count_log_count = count_log_rate = 0.0
    product = 1.0  # of rates: one logarithm for many bins
    for k in range(n_found):
        i, j = found[k] // width, found[k] % width
        histogram[0, level[i, j]] -= 1
        histogram[1, level[i, j]] += 1
        y, r = count[i, j], max(rate[i, j], floor)
        counts += y
        if y == 1:
            product *= r
            if not 1e-200 < product < 1e200:
                count_log_rate += np.log(product)
                product = 1.0
        else:
            count_log_count += y * np.log(y)
            count_log_rate += y * np.log(r)
    out[0] = n
    out[1] = n - n_found
    out[2] = counts
    out[3] = rates
    out[4] = count_log_count
    out[5] = count_log_rate + np.log(product)


@compiled
def halve(x, out):
    """Sum 2 x 2 bins of x [H, W] into ``out`` [H / 2, W / 2]."""
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            upper = x[2 * i, 2 * j] + x[2 * i, 2 * j + 1]
            out[i, j] = upper + (x[2 * i + 1, 2 * j] + x[2 * i + 1, 2 * j + 1])


@compiled
def _range(x, work):
    """Minimum and maximum of x [H, W]; ``work`` [2 or more, W] is overwritten."""
    low, high = work[0], work[1]
    low[:] = x[0]
    high[:] = x[0]
    for i in range(2, x.shape[0], 2):  # pairs of rows: half as many turns over the columns
        for j in range(x.shape[1]):
            a, b = x[i - 1, j], x[i, j]
            low[j] = min(low[j], min(a, b))
            high[j] = max(high[j], max(a, b))
    for j in range(x.shape[1]):
        low[j] = min(low[j], x[-1, j])
        high[j] = max(high[j], x[-1, j])
    return low.min(), high.max()


@compiled
def ssim(x, y, span, work):
    """Mean SSIM of x and y [H, W] over the 7 x 7 windows that lie within the map.

    ``span`` is the data range, NaN for the joint minimum to maximum; ``work`` [5, W] is scratch.
    """
    height, width = x.shape
    if min(height, width) < 7:
        return np.nan
    low_x, high_x = _range(x, work)
    low_y, high_y = _range(y, work)
    if np.isnan(span):
        span = max(high_x, high_y) - min(low_x, low_y)
    if not span > 0:
        return np.nan
    # Variances are taken about the middle of each range: they do not cancel under large offsets.
    mid_x, mid_y = (low_x + high_x) / 2, (low_y + high_y) / 2
    n = 49.0
    c1 = (0.01 * span * n) ** 2  # both sides of each ratio are scaled by n² and n - 1
    c2 = (0.03 * span) ** 2 * (n - 1)
    work[:] = 0
    # Sums over seven rows of each column. Only the sum of both variances enters.
    sum_x, sum_y, squares, products, total = work[0], work[1], work[2], work[3], work[4]
    for i in range(height):
        if i < 7:
            for j in range(width):
                a, b = x[i, j] - mid_x, y[i, j] - mid_y
                sum_x[j] += a
                sum_y[j] += b
                squares[j] += a * a + b * b
                products[j] += a * b
        else:
            for j in range(width):
                a, b = x[i, j] - mid_x, y[i, j] - mid_y
                c, d = x[i - 7, j] - mid_x, y[i - 7, j] - mid_y
                sum_x[j] += a - c
                sum_y[j] += b - d
                squares[j] += a * a + b * b - (c * c + d * d)
                products[j] += a * b - c * d
        if i < 6:
            continue
        for j in range(width - 6):
            a = b = s = p = 0.0
            for k in range(7):
                a += sum_x[j + k]
                b += sum_y[j + k]
                s += squares[j + k]
                p += products[j + k]
            covariance = p - a * b / n
            variance = s - (a * a + b * b) / n
            a += n * mid_x
            b += n * mid_y
            above = (2 * a * b + c1) * (2 * covariance + c2)
            total[j] += above / ((a * a + b * b + c1) * (variance + c2))
    return total[: width - 6].sum() / ((height - 6) * (width - 6))


@compiled
def load(truth, pred, level, g, x, y):
    """Copy a gene's counts and rates to x and y [H, W], float64.

    Rates come from ``pred`` [G, H, W] or, where that has no genes, from ``level``: the bits of
    finite half-precision numbers that are not negative.
    """
    height, width = x.shape
    bits = np.empty(width, np.int32)
    single = bits.view(np.float32)
    for i in range(height):
        for j in range(width):
            x[i, j] = truth[g, i, j]
        if len(pred):
            y[i] = pred[g, i]
            continue
        for j in range(width):
            bits[j] = np.int32(level[g, i, j]) << 13  # exponent and mantissa to their places
        for j in range(width):
            y[i, j] = single[j] * 2.0**112  # the exponents differ by 112


@compiled
def off_tissue_zero(x, mask):
    """Set x [H, W] to 0 off tissue, in place: filled, since predictions there may be NaN."""
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            if not mask[i, j]:
                x[i, j] = 0.0


@compiled
def ssim_maps(truth, pred, level, mask, span, out):
    """Write the SSIM of maps [G, H, W] in tissue to ``out`` [G]; ``span`` [G]; see ``load``."""
    x, y, work = np.empty(mask.shape), np.empty(mask.shape), np.empty((5, mask.shape[1]))
    whole = mask.all()
    for g in range(len(out)):
        load(truth, pred, level, g, x, y)
        if not whole:
            off_tissue_zero(x, mask)
            off_tissue_zero(y, mask)
        out[g] = ssim(x, y, span[g], work)


@compiled
def coarsen(x, factor, out):
    """Sum factor x factor bins of x [H, W] into ``out`` [H / factor, W / factor]."""
    rows = np.empty(x.shape[1])  # whole rows are added first: that vectorises
    for i in range(out.shape[0]):
        rows[:] = x[i * factor]
        for k in range(1, factor):
            for j in range(x.shape[1]):
                rows[j] += x[i * factor + k, j]
        for j in range(out.shape[1]):
            total = 0.0
            for k in range(factor):
                total += rows[j * factor + k]
            out[i, j] = total


@compiled
def moments_maps(truth, pred, level, mask, coarse, factor, out):
    """Write moments of maps [G, H, W] in tissue to ``out`` [G, 6]; see ``load``.

    In bins of ``factor`` x ``factor``, whose tissue is ``coarse``.
    """
    x, y, inside = np.empty(mask.shape), np.empty(mask.shape), coarse.astype(np.float64)
    large_x, large_y = np.empty(coarse.shape), np.empty(coarse.shape)
    whole = mask.all()
    for g in range(len(out)):
        load(truth, pred, level, g, x, y)
        if not whole:
            off_tissue_zero(x, mask)
            off_tissue_zero(y, mask)
        if factor == 1:
            moments(x, y, inside, out[g])
        else:
            coarsen(x, factor, large_x)
            coarsen(y, factor, large_y)
            moments(large_x, large_y, inside, out[g])


@compiled
def _buffers(height, width):
    return (
        np.empty((height, width)),
        np.empty((height // 2, width // 2)),
        np.empty((height // 4, width // 4)),
        np.empty((height // 8, width // 8)),
    )


@compiled
def score(truth, pred, level, rate, masks, floor, scored, out, histogram):
    """All sums of one patch, for the genes in truth and pred [G, H, W].

    Parameters
    ----------
    truth, pred, level
        Counts and predicted rates, see ``load``; ``level`` also ranks them, see
        ``scores.N_LEVELS``.
    rate
        True rate, or an array without genes where it is unknown.
    masks
        Tissue at 2, 4, 8 and 16 µm.
    floor
        Smallest rate, see ``metrics.LEAST_RATE``.
    scored
        Whether there is tissue enough for SSIM.
    out
        Arrays to write, see ``scores.PatchSums``.
    histogram
        [G, 2, levels]: bins without and with a count at each level; added to.
    """
    moments_out, poisson_out, ssim_out, truth8, pred8 = out
    genes, height, width = truth.shape
    mask = masks[0]
    whole = mask.all()
    everywhere, everywhere8 = np.ones(mask.shape), np.ones(masks[2].shape)
    inside, inside4 = mask.astype(np.float64), masks[1].astype(np.float64)
    inside8, inside16 = masks[2].astype(np.float64), masks[3].astype(np.float64)
    found = np.empty(mask.size, np.int64)
    work = np.empty((5, width))
    x, x4, x8, x16 = _buffers(height, width)
    y, y4, y8, y16 = _buffers(height, width)
    z, z4, z8, _ = _buffers(height, width)
    for g in range(genes):
        load(truth, pred, level, g, x, y)
        if not whole:
            # Unmasked scores come first: the maps are then cleared off tissue in place.
            halve(x, x4)
            halve(y, y4)
            halve(x4, x8)
            halve(y4, y8)
            moments(x, y, everywhere, moments_out[g, 4])
            moments(x8, y8, everywhere8, moments_out[g, 5])
            off_tissue_zero(x, mask)
            off_tissue_zero(y, mask)
        halve(x, x4)
        halve(y, y4)
        halve(x4, x8)
        halve(y4, y8)
        halve(x8, x16)
        halve(y8, y16)
        moments(x, y, inside, moments_out[g, 0])
        moments(x4, y4, inside4, moments_out[g, 1])
        moments(x8, y8, inside8, moments_out[g, 2])
        moments(x16, y16, inside16, moments_out[g, 3])
        if whole:
            moments_out[g, 4] = moments_out[g, 0]
            moments_out[g, 5] = moments_out[g, 2]
        if len(rate):
            z[:] = rate[g]
            off_tissue_zero(z, mask)
            halve(z, z4)
            halve(z4, z8)
            moments(z, y, inside, moments_out[g, 6])
            moments(z8, y8, inside8, moments_out[g, 7])
        poisson(x, y, level[g], mask, floor, found, poisson_out[g], histogram[g])
        # Bins at the border that do not count must not enter the windows of SSIM either.
        x8 *= inside8
        y8 *= inside8
        if scored:
            ssim_out[g, 0] = ssim(x, y, np.nan, work)
            ssim_out[g, 1] = ssim(x8, y8, np.nan, work[:, : width // 4])
        truth8[g], pred8[g] = x8, y8


@compiled
def rank_sums(packed, rank_of_count):
    """Sum of squares of the ranks of rates, and of their products with the ranks of counts.

    Ranks are about their mean, ties at their mean rank. ``packed`` is sorted, see
    ``metrics.spearman``; ``rank_of_count`` holds the rank of each count.
    """
    n = len(packed)
    yy = xy = 0.0
    start = 0
    while start < n:
        rate = packed[start] >> np.uint64(32)
        stop, counts = start, 0.0
        while stop < n and packed[stop] >> np.uint64(32) == rate:
            counts += rank_of_count[packed[stop] & np.uint64(0xFFFFFFFF)]
            stop += 1
        rank = (start + stop - n) / 2
        yy += (stop - start) * rank * rank
        xy += rank * counts
        start = stop
    return yy, xy
