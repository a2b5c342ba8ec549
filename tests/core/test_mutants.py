"""Hand-made faults in losses, masks and scores: for each, tests that exist must notice.

``SPARSITY_TRAP_MUTANTS=all`` tries every one; without it, a fixed sample.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT


class Mutant(NamedTuple):
    """A fault: what of a file of the module is replaced, and the tests that have to fail."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = {
    "softplus in place of exp": Mutant(
        "losses.py",
        'return torch.exp(eta) if link == "exp" else F.softplus(eta)',
        "return F.softplus(eta)",
        ("core/test_losses.py::test_initial_eta_inverts_the_link_and_is_finite_without_counts",),
    ),
    "Poisson with the sign of its count turned": Mutant(
        "bin_losses.py",
        "torch.exp(log_rate) - count * log_rate",
        "torch.exp(log_rate) + count * log_rate",
        ("core/test_losses.py::test_gradient_in_eta_under_the_exp_link",),
    ),
    "MSE on log1p without log1p of the counts": Mutant(
        "bin_losses.py",
        "(torch.log1p(count) - torch.log1p(rate))",
        "(count - torch.log1p(rate))",
        ("core/test_losses.py::test_squared_errors_agree_with_torch",),
    ),
    "dispersion and its inverse exchanged": Mutant(
        "bin_losses.py",
        "    softplus = F.softplus(log_rate - log_dispersion)\n",
        "    log_dispersion = -log_dispersion\n"
        "    softplus = F.softplus(log_rate - log_dispersion)\n",
        ("core/test_losses.py::test_dispersion_is_the_inverse_of_the_variance_beyond_poisson",),
    ),
    "loss over all bins, whatever the mask": Mutant(
        "losses.py",
        "tissue = mask if self.masked else torch.ones_like(mask)",
        "tissue = torch.ones_like(mask)",
        ("core/test_losses.py::test_bins_outside_the_tissue_have_no_influence",),
    ),
    "larger bins of the loss sum what is off tissue": Mutant(
        "losses.py",
        "counts = counts * tissue[:, None]",
        "counts = counts * 1",
        ("core/test_losses.py::test_bins_outside_the_tissue_have_no_influence",),
    ),
    "the weight of the power dial turned upside down": Mutant(
        "bin_losses.py",
        "torch.exp((1 - p) * log_rate) / (1 - p)",
        "torch.exp((1 + p) * log_rate) / (1 + p)",
        ("core/test_loss_shelf.py::test_power_weighs_the_residual_by_the_variance",),
    ),
    "presence of all counts": Mutant(
        "bin_losses.py",
        "torch.where(count > 0, -_log_presence(log_rate), torch.exp(log_rate))",
        "torch.exp(log_rate) - torch.where(count > 0, 1.0, 0.0) * log_rate",
        ("core/test_loss_shelf.py::test_presence_is_binary_cross_entropy",),
    ),
    "counts of a hurdle that are not truncated": Mutant(
        "bin_losses.py",
        "poisson(log_positive, count) + _log_presence(log_positive)",
        "poisson(log_positive, count)",
        ("core/test_loss_shelf.py::test_hurdle_with_one_rate_is_poisson",),
    ),
    "inflation that lowers the expected count": Mutant(
        "bin_losses.py",
        "negative_binomial(log_rate + present, count, log_dispersion)",
        "negative_binomial(log_rate, count, log_dispersion)",
        (
            "core/test_loss_shelf.py::test_zero_inflated_nb_agrees_with_statsmodels_and_has_the_rate_as_its_mean",
        ),
    ),
    "roots without Anscombe's constant": Mutant(
        "bin_losses.py",
        "_ANSCOMBE = 3 / 8",
        "_ANSCOMBE = 1e-8",
        ("core/test_loss_shelf.py::test_l1_and_square_roots_written_out",),
    ),
    "weights of genes as they come": Mutant(
        "losses.py",
        "return gene_weight / gene_weight.mean()",
        "return gene_weight",
        ("core/test_loss_shelf.py::test_gene_weights_multiply_the_loss_of_each_gene",),
    ),
    "correlation over all bins, tissue or not": Mutant(
        "map_losses.py",
        "    inside, n = tissue[:, None], tissue.sum().clamp(min=1)\n",
        "    tissue = torch.ones_like(tissue)\n"
        "    inside, n = tissue[:, None], tissue.sum().clamp(min=1)\n",
        ("core/test_loss_shelf.py::test_pearson_equals_scipy",),
    ),
    "SSIM as a loss with the population covariance": Mutant(
        "map_losses.py",
        "sample = side**2 / (side**2 - 1)",
        "sample = 1",
        ("core/test_loss_shelf.py::test_ssim_equals_scikit_image",),
    ),
    "multinomial over the genes of a bin": Mutant(
        "map_losses.py",
        "inner.flatten(2).logsumexp(2)[:, :, None, None]",
        "inner.logsumexp(1, keepdim=True)",
        ("core/test_loss_shelf.py::test_multinomial_equals_scipy",),
    ),
    "exposure that divides": Mutant(
        "losses.py",
        "seen = seen + log_exposure[:, None]",
        "seen = seen - log_exposure[:, None]",
        ("core/test_loss_shelf.py::test_depth_is_conditioned_out",),
    ),
    "weights by the mean in place of its inverse": Mutant(
        "training_data.py",
        '"1/mean": 1 / rate',
        '"1/mean": rate',
        (
            "training/test_training_data.py::test_weights_of_genes_follow_from_their_training_counts",
        ),
    ),
    "a larger bin half in tissue counts": Mutant(
        "bins.py",
        "2 * bin_sum(mask, factor) > factor * factor",
        "2 * bin_sum(mask, factor) >= factor * factor",
        ("core/test_bins.py::test_larger_bin_is_in_tissue_when_more_than_half_is",),
    ),
    "larger bins of the scores sum what is off tissue": Mutant(
        "_loops.py",
        "            off_tissue_zero(x, mask)\n"
        "            off_tissue_zero(y, mask)\n"
        "        halve(x, x4)\n",
        "        halve(x, x4)\n",
        ("core/test_metrics.py::test_streaming_equals_one_shot",),
    ),
    "SSIM in windows of 7 x 6": Mutant(
        "_loops.py",
        "for k in range(7):",
        "for k in range(6):",
        ("core/test_metrics.py::test_ssim_equals_scikit_image",),
    ),
    "SSIM with the population covariance": Mutant(
        "_loops.py",
        "c2 = (0.03 * span) ** 2 * (n - 1)",
        "c2 = (0.03 * span) ** 2 * n",
        ("core/test_metrics.py::test_ssim_equals_scikit_image",),
    ),
    "SSIM over the range of the counts alone": Mutant(
        "_loops.py",
        "span = max(high_x, high_y) - min(low_x, low_y)",
        "span = high_x - low_x",
        ("core/test_metrics.py::test_ssim_equals_scikit_image",),
    ),
    "PCC of all genes together": Mutant(
        "metrics.py",
        "return _total(Moments.of, truth, pred, mask, bin_factor).pcc()",
        "scores = _total(Moments.of, truth, pred, mask, bin_factor).pooled().pcc()\n"
        "    return scores.repeat(truth.shape[1])",
        ("core/test_metrics.py::test_pcc_equals_scipy",),
    ),
    "undefined scores are 0": Mutant(
        "metrics.py",
        "np.where(positive, above / np.where(positive, below, 1), np.nan)",
        "np.where(positive, above / np.where(positive, below, 1), 0.0)",
        ("core/test_metrics.py::test_pcc_is_nan_when_a_side_is_constant",),
    ),
    "deviance explained against the test mean": Mutant(
        "metrics.py",
        "rate = np.maximum(rate, LEAST_RATE)\n",
        "rate = np.maximum(self.count / self.n, LEAST_RATE)\n",
        ("core/test_metrics.py::test_constant_prediction_has_the_null_of_each_metric",),
    ),
    "counts kept whatever the share to keep": Mutant(
        "training_data.py",
        "draw.binomial(counts[present], keep)",
        "counts[present]",
        ("training/test_training_data.py::test_thinning_is_binomial_and_repeats",),
    ),
    "counts dropped with the probability to keep them": Mutant(
        "training_data.py",
        "draw.binomial(counts[present], keep)",
        "draw.binomial(counts[present], 1 - keep)",
        ("training/test_training_data.py::test_thinning_is_binomial_and_repeats",),
    ),
    "the mask is not turned with image and counts": Mutant(
        "training_data.py",
        "turned(counts), turned(mask))",
        "turned(counts), mask)",
        ("training/test_training_data.py::test_image_counts_and_mask_are_turned_alike",),
    ),
    "ceiling without the noise of the counts": Mutant(
        "evaluation/ceilings.py",
        "np.sqrt(variance / (variance + self.moments.mean_x))",
        "np.sqrt(variance / (variance + 1))",
        (
            "analysis/test_ceilings.py::test_poisson_ceiling_is_the_correlation_of_the_rate_with_its_counts",
        ),
    ),
}
SAMPLE = (
    "Poisson with the sign of its count turned",
    "loss over all bins, whatever the mask",
    "SSIM with the population covariance",
    "counts dropped with the probability to keep them",
)

#: Runs pytest once for each line of JSON on stdin, in a child of its own: other packages are
#: imported once, the module and its tests anew. Scoring is not compiled: compiling anew takes
#: longer than a few small maps take in plain Python.
DRIVER = """
import json, os, sys
import numba, numpy, pandas, pyarrow, pydantic, pytest, safetensors.torch, scipy.stats, torch, zarr
import skimage.metrics, sklearn.metrics
torch.set_num_threads(1)
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        said = os.open(order["log"], os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 1)
        os.dup2(said, 2)
        options = ["-x", "-q", "-p", "no:cacheprovider", "--assert", "plain"]
        code = pytest.main([*options, *order["tests"]])
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def copy(tmp_path) -> Path:
    """Module, tests and presets, to be changed."""
    for name in ("sparsity_trap", "tests", "presets"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    return tmp_path


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_can_still_be_made(name):
    """Most are tried only when asked for, while the module goes on changing."""
    file, old, _, tests = MUTANTS[name]
    assert (ROOT / "sparsity_trap" / file).read_text().count(old) == 1
    for test in tests:
        source, function = test.split("::")
        assert f"def {function}(" in (ROOT / "tests" / source).read_text()


@pytest.mark.slow
def test_every_mutant_is_caught(copy):
    every = os.environ.get("SPARSITY_TRAP_MUTANTS") == "all"
    tried = MUTANTS if every else {name: MUTANTS[name] for name in SAMPLE}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SPARSITY", "PYTEST"))}
    single = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
    # A file changed twice within a second has one time: Python would take its old bytecode.
    fixed = {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "NUMBA_DISABLE_JIT": "1"}
    fixed["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER], cwd=copy, env=kept | single | fixed, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as driver:  # fmt: skip

        def code_of(name: str, tests: tuple[str, ...]) -> int:
            paths = [f"tests/{test}" for test in tests]
            order = {"tests": paths, "log": str(copy / f"{name}.log")}
            driver.stdin.write(json.dumps(order) + "\n")
            driver.stdin.flush()
            return int(driver.stdout.readline())

        sound = tuple(dict.fromkeys(test for mutant in tried.values() for test in mutant.tests))
        assert code_of("sound", sound) == 0, (copy / "sound.log").read_text()
        codes = {}
        for name, (file, old, new, tests) in tried.items():
            path = copy / "sparsity_trap" / file
            text = path.read_text()
            path.write_text(text.replace(old, new))
            codes[name] = code_of(name, tests)
            path.write_text(text)
        driver.stdin.close()
    print(f"{len(codes)} mutants, {list(codes.values()).count(1)} caught")
    # 1: tests failed. Whatever else ended pytest is no proof.
    assert {name: code for name, code in codes.items() if code != 1} == {}
