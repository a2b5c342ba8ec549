"""Departures of a simulated section: what is put in is found in the counts, and nothing by default.

Each section has the seed, the tissue and the image of the plain one, so that rates can be compared.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from scipy import ndimage
from test_section import Section

from sparsity_trap.bins import BIN_UM
from sparsity_trap.settings import Simulation
from sparsity_trap.simulation import departures
from sparsity_trap.simulation import section as simulate

SETTINGS = Simulation(side_um=384, pixel_um=1)
stream = partial(simulate._rng, SETTINGS, "P1")


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """A section of P5 with some departures."""
    folder = tmp_path_factory.mktemp("sections")

    def write(**keys) -> Section:
        outs = folder / "-".join(f"{key}={value}" for key, value in keys.items()) / "outs"
        if not outs.exists():
            settings = Simulation(**SETTINGS.model_dump() | keys)
            simulate.simulate_section(outs, "P5", settings)
        return Section(outs)

    return write


@pytest.fixture(scope="module")
def plain(make) -> Section:
    return make()


def test_by_default_counts_are_the_poisson_draws_that_they_were(plain):
    """Of one stream, gene after gene, from the stored rates; and nothing else is written."""
    draw = simulate._rng(SETTINGS, "P5", "counts")
    for gene, rate in enumerate(plain.rate[:, plain.mask]):
        np.testing.assert_array_equal(plain.counts[gene], draw.poisson(rate), str(gene))
    assert set(plain.truth) == {"rate", "row_factor", "col_factor"}
    assert set(plain.truth.attrs) == {"genes", "source", "seed", "patient"}


def test_by_default_a_rate_is_the_plain_one():
    depart = departures.Departures(SETTINGS, stream, 3, np.ones((8, 8), bool))
    rate = np.random.default_rng(0).random((8, 8), np.float32)
    assert (depart.rate(rate, rate, rate) == rate).all()


def dispersion(section: Section, theta: np.ndarray) -> np.ndarray:
    """Squared residuals of each gene against their expectation under θ."""
    rate = section.rate[:, section.mask].astype(float)
    expected = rate + rate**2 / theta[:, None]
    return ((section.counts - rate) ** 2).sum(1) / expected.sum(1)


def test_dispersed_counts_have_the_variance_of_a_negative_binomial(make, plain):
    section = make(dispersion=0.5)
    np.testing.assert_array_equal(section.rate, plain.rate)  # a mean stays a mean
    theta = section.truth["theta"][:]
    assert (theta == 0.5).all()
    ratio = dispersion(section, theta)
    rate = section.rate[:, section.mask].astype(float)
    # Squared residuals of rates of 0.1 have long tails: a few percent over 30,000 bins.
    assert abs(ratio.mean() - 1) < 0.03 and np.abs(ratio - 1).max() < 0.35
    rich = rate.mean(1) > 0.2
    assert rich.any()
    fano = ((section.counts - rate) ** 2).sum(1) / rate.sum(1)
    assert (fano[rich] > 1 + rate[rich].mean(1) / 0.5 * 0.8).all()
    zeros = np.exp(-0.5 * np.log1p(rate / 0.5)).mean(1)  # (1 + μ/θ)^-θ
    sampling = np.sqrt(zeros * (1 - zeros) / rate.shape[1])
    assert (np.abs((section.counts == 0).mean(1) - zeros) < 4.5 * sampling).all()
    np.testing.assert_array_equal(section.image, plain.image)


def test_dispersion_may_differ_between_genes_and_is_the_same_in_every_patient(make):
    section = make(dispersion=1.0, dispersion_sd=0.8)
    theta = section.truth["theta"][:]
    assert 0.5 < np.log(theta).std() < 1.1 and abs(np.log(theta).mean()) < 0.35
    assert abs(dispersion(section, theta).mean() - 1) < 0.04
    settings = SETTINGS.model_copy(update={"dispersion": 1.0, "dispersion_sd": 0.8})
    other = departures.Departures(settings, stream, 50, np.ones((8, 8), bool))
    np.testing.assert_array_equal(other.theta, theta)


def test_dropout_takes_its_share_of_the_counts(make, plain):
    section = make(dropout=0.3)
    rate = section.rate[:, section.mask].astype(float)
    np.testing.assert_allclose(section.rate, 0.7 * plain.rate, rtol=2e-3, atol=1e-6)
    total = rate.sum(1)
    # The variance of a count is μ + μ² d / (1 - d).
    spread = np.sqrt((rate + rate**2 * 0.3 / 0.7).sum(1))
    assert np.abs((section.counts.sum(1) - total) / spread).max() < 4.5
    zeros = (0.3 + 0.7 * np.exp(-rate / 0.7)).mean(1)
    sampling = np.sqrt(zeros * (1 - zeros) / rate.shape[1])
    assert (np.abs((section.counts == 0).mean(1) - zeros) < 4.5 * sampling).all()


def best_shift(fixed: np.ndarray, moved: np.ndarray, reach: int = 4) -> np.ndarray:
    """Shift, in bins, at which ``fixed`` best agrees with ``moved``, by cross-correlation."""
    inner = slice(reach, -reach)
    scores = np.array(
        [
            [
                np.corrcoef(
                    moved[inner, inner].ravel(),
                    np.roll(fixed, (-i, -j), (0, 1))[inner, inner].ravel(),
                )[0, 1]
                for j in range(-reach, reach + 1)
            ]
            for i in range(-reach, reach + 1)
        ]
    )
    at = np.array(np.unravel_index(scores.argmax(), scores.shape))
    found = []
    for axis in range(2):  # the top of a parabola, between the steps
        low, high = at.copy(), at.copy()
        low[axis], high[axis] = low[axis] - 1, high[axis] + 1
        a, b, c = scores[tuple(low)], scores[tuple(at)], scores[tuple(high)]
        found.append(at[axis] - reach + (a - c) / (2 * (a - 2 * b + c)))
    return np.array(found)


def test_misplaced_counts_are_found_where_the_displacement_says(make, plain):
    section = make(registration_um=4)
    moved = section.truth["displacement"][:]
    length = np.sqrt((moved**2).sum(0).mean()) * BIN_UM
    assert moved.shape == (2, *section.mask.shape) and length == pytest.approx(4, rel=1e-3)
    np.testing.assert_array_equal(section.image, plain.image)
    np.testing.assert_array_equal(section.mask, plain.mask)
    array = plain.truth["row_factor"][:][:, None] * plain.truth["col_factor"][:]
    rates = [s.rate.astype(float).sum(0) / array for s in (plain, section)]  # without stripes
    side, errors = 48, []
    for row in range(0, 192 - side + 1, side):
        for col in range(0, 192 - side + 1, side):
            box = slice(row, row + side), slice(col, col + side)
            if plain.mask[box].mean() > 0.95:
                expected = moved[:, *box].mean((1, 2))
                errors.append(best_shift(*(rate[box] for rate in rates)) - expected)
    assert len(errors) >= 4
    assert np.sqrt(np.mean(np.square(errors))) < 0.5  # of displacements of 2 bins
    np.testing.assert_allclose(
        section.rate[:, section.mask].mean(1), plain.rate[:, plain.mask].mean(1), rtol=5e-3
    )


def agreement(section: Section, plain: Section) -> float:
    """Mean over genes of the correlation between a section's rates and the image's."""
    pairs = zip(section.rate[:, plain.mask], plain.rate[:, plain.mask], strict=True)
    return float(np.mean([np.corrcoef(a.astype(float), b.astype(float))[0, 1] for a, b in pairs]))


def test_the_weaker_the_link_the_less_the_image_tells(make, plain):
    found = {link: agreement(make(image_link=link), plain) for link in (0.7, 0.3, 0.0)}
    assert 1 > found[0.7] > found[0.3] > found[0.0]
    # Stripes and library size, which no image shows, are shared.
    assert found[0.7] > 0.8 and found[0.0] < 0.35
    section = make(image_link=0.3)
    means = [s.rate[:, s.mask].astype(float).mean(1) for s in (section, plain)]
    np.testing.assert_allclose(*means, rtol=5e-3)
    total = section.rate[:, section.mask].astype(float).sum(1)
    assert np.abs((section.counts.sum(1) - total) / np.sqrt(total)).max() < 4.5


def test_a_hidden_programme_has_spread_and_scale_of_the_gene_and_nothing_else_of_it():
    rng = np.random.default_rng(1)
    field = ndimage.gaussian_filter(rng.standard_normal((400, 400)), 6)
    rate = np.exp(field / field.std()).astype(np.float32)
    tissue = np.ones(rate.shape, bool)
    tissue[:50] = False
    hidden = departures.hidden_programme(rng, rate, tissue)
    inside, drawn = rate[tissue], hidden[tissue]
    assert drawn.mean() == pytest.approx(inside.mean(), rel=1e-4)
    assert drawn.std() == pytest.approx(inside.std(), rel=0.2)
    widths = [departures.half_width(a, tissue) for a in (hidden, rate)]
    assert widths[0] == pytest.approx(widths[1], rel=0.25)
    assert abs(np.corrcoef(inside, drawn)[0, 1]) < 0.15


def test_the_half_width_of_a_smooth_field_is_that_of_its_kernel():
    rng = np.random.default_rng(0)
    field = ndimage.gaussian_filter(rng.standard_normal((600, 600)), 5, mode="wrap")
    expected = 5 * 2 * np.sqrt(np.log(2))
    found = departures.half_width(field, np.ones(field.shape, bool))
    assert found == pytest.approx(expected, rel=0.05)


def test_departures_go_together(make):
    section = make(dispersion=1.0, registration_um=2, dropout=0.2, image_link=0.5)
    rate = section.rate[:, section.mask].astype(float)
    # Of a gamma mixture with θ = 1, thinned to 0.8: E[(y - μ)²] = μ + μ² (2 / 0.8 - 1).
    ratio = ((section.counts - rate) ** 2).sum(1) / (rate + rate**2 * (2 / 0.8 - 1)).sum(1)
    assert abs(ratio.mean() - 1) < 0.05
    assert set(section.truth) == {"rate", "row_factor", "col_factor", "theta", "displacement"}


def test_the_same_settings_give_the_same_departures(tmp_path):
    settings = Simulation(
        side_um=203, dispersion=1, dispersion_sd=0.5, registration_um=2, dropout=0.1, image_link=0.5
    )
    for name in ("a", "b"):
        simulate.simulate_section(tmp_path / name, "P1", settings)
    first, second = (Section(tmp_path / name) for name in ("a", "b"))
    np.testing.assert_array_equal(first.counts, second.counts)
    np.testing.assert_array_equal(first.rate, second.rate)


def test_a_spread_without_dispersion_is_refused():
    with pytest.raises(ValueError, match="give dispersion too"):
        Simulation(side_um=384, dispersion_sd=1)
