"""Compiled loops of `_fused`: value of a loss over some genes, and its gradient in η.

Imported when a loss is first taken on a CPU, since importing numba takes a second; the first call
ever compiles, and the result is kept beside this file. Maps are [G, bins], counts in bytes, all
else of one floating type; ``weight`` [bins] is that of a bin, ``scale`` [G] that of a gene.
``slope`` is dλ/dη. The gradient goes to ``out``, the value is returned.
What has genes comes first among the arguments, so that threads can share them out.
"""

from __future__ import annotations

import numpy as np

from sparsity_trap._compiled import compiled

#: Below this η, log softplus(η) = η and its slope 1 to float32 precision, as in `losses.log_rate`.
_LINEAR = -15.0


@compiled
def softplus(eta, power, rate, slope):
    """Write softplus(η) to ``rate``, where log(1 + eᵞ) stands, and its slope to ``slope``.

    ``power`` has eᵞ, which is infinite for large η: there the link is linear, as in torch.
    """
    one = eta.dtype.type(1)
    for g in range(len(eta)):
        x, p, r, s = eta[g], power[g], rate[g], slope[g]
        for j in range(len(x)):
            r[j] = x[j] if x[j] > 20 else r[j]
            s[j] = one if x[j] > 20 else p[j] / (one + p[j])


@compiled
def mse(rate, slope, counts, scale, out, weight):
    """(y − λ)²."""
    total = 0.0
    for g in range(len(counts)):  # rows on their own: only so do the loops vectorise
        r, s, c, o, k = rate[g], slope[g], counts[g], out[g], scale[g]
        part = 0.0
        for j in range(len(c)):
            w = weight[j] * k
            error = r[j] - rate.dtype.type(c[j])
            part += w * error * error
            o[j] = w * (error + error) * s[j]
        total += part
    return total


@compiled
def mse_log1p(rate, slope, log1p_rate, counts, scale, out, weight, log1p_count):
    """(log(1 + y) − log(1 + λ))²; ``log1p_count`` [256] has the logarithm of each count."""
    one = rate.dtype.type(1)
    total = 0.0
    for g in range(len(counts)):
        r, s, log, c, o, k = rate[g], slope[g], log1p_rate[g], counts[g], out[g], scale[g]
        for j in range(len(c)):
            o[j] = log1p_count[c[j]]
        part = 0.0
        for j in range(len(c)):
            w = weight[j] * k
            error = log[j] - o[j]
            part += w * error * error
            o[j] = w * (error + error) * s[j] / (one + r[j])
        total += part
    return total


@compiled
def poisson(eta, rate, slope, counts, scale, out, weight, exponential):
    """λ − y log λ; the logarithm is taken only where there is a count."""
    one = rate.dtype.type(1)
    total = 0.0
    for g in range(len(counts)):
        x, r, s, c, o, k = eta[g], rate[g], slope[g], counts[g], out[g], scale[g]
        part = 0.0
        if exponential:
            for j in range(len(c)):
                w, y = weight[j] * k, rate.dtype.type(c[j])
                part += w * (r[j] - y * x[j])
                o[j] = w * (r[j] - y)
        else:
            for j in range(len(c)):
                w = weight[j] * k
                part += w * r[j]
                o[j] = w * s[j]
            for j in range(len(c)):
                if c[j] > 0:
                    wy = weight[j] * k * rate.dtype.type(c[j])
                    linear = x[j] < _LINEAR
                    part -= wy * (x[j] if linear else np.log(r[j]))
                    o[j] -= wy * (one if linear else s[j] / r[j])
        total += part
    return total


@compiled
def rising(theta, most, sums, slopes):
    """Write Σ_{k<y} log(1 + k/θ) of counts y to ``most``, and its slope in log θ.

    Summed up, it cannot cancel, and counts are small.
    """
    sums[0] = slopes[0] = 0.0
    for k in range(most):
        sums[k + 1] = sums[k] + np.log1p(k / theta)
        slopes[k + 1] = slopes[k] - k / (theta + k)


@compiled
def negative_binomial(
    eta, rate, slope, softplus, log_dispersion, counts, scale, out, own, weight, exponential
):
    """(θ + y) log(1 + λ/θ) − y log λ − Σ_{k<y} log(1 + k/θ); its slope in log θ goes to ``own``.

    ``softplus`` has log(1 + λ/θ).
    """
    one = rate.dtype.type(1)
    sums, slopes = np.empty(256), np.empty(256)
    total = 0.0
    for g in range(len(counts)):
        x, r, s, soft = eta[g], rate[g], slope[g], softplus[g]
        c, o, k = counts[g], out[g], scale[g]
        theta = np.exp(log_dispersion[g])
        rising(float(theta), c.max(), sums, slopes)
        part = slope_part = 0.0
        for j in range(len(c)):
            w = weight[j] * k
            both = theta + rate.dtype.type(c[j])
            inverse = both / (theta + r[j])
            part += w * both * soft[j]
            slope_part += w * (theta * soft[j] - inverse * r[j])
            o[j] = w * inverse * s[j]
        for j in range(len(c)):
            if c[j] > 0:
                w, y = weight[j] * k, rate.dtype.type(c[j])
                linear = exponential or x[j] < _LINEAR
                part -= w * (y * (x[j] if linear else np.log(r[j])) + sums[c[j]])
                slope_part -= w * slopes[c[j]]
                o[j] -= w * y * (one if linear else s[j] / r[j])
        own[g] = slope_part
        total += part
    return total
