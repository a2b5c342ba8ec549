"""Ways in which counts depart from Poisson draws of what the image tells, each with its setting.

At the defaults no number changes. With a departure a gene keeps its mean in the section (dropout
takes its share), and the stored rate stays the mean of the counts: what is drawn bin by bin, gamma
variables and lost counts, is no part of it; misplaced and hidden expression is.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import zarr
from scipy import ndimage

from sparsity_trap.bins import BIN_UM
from sparsity_trap.settings import Simulation
from sparsity_trap.simulation.tissue import smooth_field

#: Standard deviation of the kernel that smooths the displacement, µm: bins of a patch move alike,
#: patches do not.
_BEND_UM = 200.0

#: Farthest distance at which the scale of a gene's pattern is looked for, bins.
_FARTHEST = 64


def displacement(
    rng: np.random.Generator, shape: tuple[int, int], registration_um: float
) -> np.ndarray:
    """Draw how far each bin's counts come from beside the place that the image gives it.

    Parameters
    ----------
    rng
        Source of randomness.
    shape
        Rows and columns of bins.
    registration_um
        Root mean square length of the displacement over the section, µm.

    Returns
    -------
    float32 [2, rows, columns], along array rows and columns, in bins.
    """
    sigma = min(_BEND_UM / BIN_UM, min(shape) / 4)
    field = np.stack([smooth_field(rng, shape, sigma) for _ in range(2)])
    length = np.sqrt((field**2).sum(axis=0).mean())
    return (field * (registration_um / BIN_UM / length)).astype(np.float32)


def misplace(rate: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """Rates [row, column] taken from where `displacement` says, between bins by interpolation."""
    at = np.indices(rate.shape, np.float32) + moved
    return ndimage.map_coordinates(rate, at, order=1, mode="nearest")


def half_width(rate: np.ndarray, tissue: np.ndarray) -> float:
    """Distance at which the autocorrelation of a map falls to one half, bins.

    Parameters
    ----------
    rate
        Map [row, column].
    tissue
        Bins that count, bool [row, column].
    """
    apart = np.where(tissue, rate - rate[tissue].mean(), 0).astype(np.float64)
    found = [1.0]
    for lag in range(1, min(_FARTHEST, *rate.shape)):
        pairs = [(apart[lag:], apart[:-lag]), (apart[:, lag:], apart[:, :-lag])]
        both = [(tissue[lag:] & tissue[:-lag]).sum(), (tissue[:, lag:] & tissue[:, :-lag]).sum()]
        product = sum(np.vdot(a, b) for a, b in pairs) / max(1, sum(both))
        found.append(float(product / (apart**2).sum() * tissue.sum()))
        if found[-1] < 0.5:
            return lag - (0.5 - found[-1]) / (found[-2] - found[-1])
    return float(len(found))


def hidden_programme(rng: np.random.Generator, rate: np.ndarray, tissue: np.ndarray) -> np.ndarray:
    """Draw a map that the image tells nothing of, with a gene's mean, spread and spatial scale.

    It is the exponential of a smooth Gaussian field: of the same mean and coefficient of variation
    over the tissue, and with an autocorrelation that falls over the same distance.

    Parameters
    ----------
    rng
        Source of randomness.
    rate
        The gene's rate, [row, column].
    tissue
        bool [row, column].

    Returns
    -------
    float32 [row, column].
    """
    inside = rate[tissue]
    spread = np.sqrt(np.log1p(inside.var() / inside.mean() ** 2))
    # A field smoothed by a Gaussian has the autocorrelation exp(-d² / 4 sigma²).
    sigma = half_width(rate, tissue) / (2 * np.sqrt(np.log(2)))
    hidden = np.exp(spread * smooth_field(rng, rate.shape, sigma))
    return (hidden * (inside.mean() / hidden[tissue].mean())).astype(np.float32)


class Departures:
    """What is drawn of a section's departures before its genes, and how they change each.

    Parameters
    ----------
    settings
        Of the simulation.
    stream
        Gives a source of randomness for a purpose, so that one departure leaves the others' draws.
    genes
        Number of genes.
    tissue
        Bins in tissue, bool [row, column].

    Attributes
    ----------
    theta
        Shape of each gene's gamma variable, float64 [gene]; 0 for Poisson counts.
    moved
        `displacement` of the bins; None where they lie where the image says.
    """

    def __init__(
        self,
        settings: Simulation,
        stream: Callable[[str], np.random.Generator],
        genes: int,
        tissue: np.ndarray,
    ) -> None:
        self.settings, self.tissue = settings, tissue
        # How variable a gene is belongs to the gene: the same in every patient.
        between = np.random.default_rng([settings.seed, genes]).standard_normal(genes)
        self.theta = settings.dispersion * np.exp(settings.dispersion_sd * between)
        self.moved = None
        if settings.registration_um:
            bend = stream("registration")
            self.moved = displacement(bend, tissue.shape, settings.registration_um)
        self._hidden, self._counts = stream("hidden"), stream("counts")
        self._gamma, self._lost = stream("dispersion"), stream("dropout")

    def rate(self, told: np.ndarray, weight: np.ndarray, plain: np.ndarray) -> np.ndarray:
        """Mean counts of a gene in every bin, float32 [row, column].

        Parameters
        ----------
        told
            What the image tells: the gene's RNA before what belongs to the array.
        weight
            Factor of each bin of the array, 0 off tissue.
        plain
            Rate of the section without departures, of which the gene keeps the mean.
        """
        link, rate = self.settings.image_link, plain
        if self.moved is not None or link < 1:
            # A hidden programme is one of the cells: where these are misplaced, so is it.
            mixed = told
            if link < 1:
                mixed = link * told + (1 - link) * hidden_programme(self._hidden, told, self.tissue)
            if self.moved is not None:
                mixed = misplace(mixed, self.moved)
            rate = mixed * weight
            rate *= plain[self.tissue].mean() / rate[self.tissue].mean()
        return rate * (1 - self.settings.dropout)

    def draw(self, gene: int, mean: np.ndarray) -> np.ndarray:
        """Counts of a gene around their means, float32 [bin].

        The variance is mean + mean² / theta, more where counts are lost: those that are left are
        drawn from larger rates, so that ``mean`` is the mean over both.
        """
        theta, lost = self.theta[gene], self.settings.dropout
        if lost:
            mean = mean / np.float32(1 - lost)
        if theta:
            mean = mean * self._gamma.gamma(theta, 1 / theta, mean.shape)
        drawn = self._counts.poisson(mean)
        if lost:
            drawn[self._lost.random(mean.shape) < lost] = 0
        return drawn

    def write(self, truth: zarr.Group) -> None:
        """Keep with the true rates what cannot be read from them."""
        if self.settings.dispersion:
            truth["theta"] = self.theta
        if self.moved is not None:
            truth["displacement"] = self.moved
