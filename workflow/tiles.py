"""Train on the real tiles and score: python workflow/tiles.py FOLDER [--cores 2]

FOLDER holds the tiles. Five strips of the section are held out in turn. Each decoder and loss takes
the learning rate that is best on strips which are not those it is then tested on. Finished fits
are kept in ``results/tiles``, so a stopped run goes on; what they come to is written to
``results/real_tiles``, which the book shows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from sparsity_trap import tiles as real
from sparsity_trap.analysis import ceilings, controls
from sparsity_trap.files import alone, building, code_digest, commit, hardware
from sparsity_trap.progress import say, track
from sparsity_trap.settings import ROOT, UserError

KEPT = ROOT / "results" / "tiles"
RESULTS = ROOT / "results" / "real_tiles"

#: Code that a fit depends on.
CODE = ("tiles.py", "trainer.py", "decoders.py", "*losses.py", "filterbank.py", "bins.py", "_*.py",
        "metrics.py", "analysis/controls.py")  # fmt: skip


class Plan(NamedTuple):
    """Fits of a decoder: its losses and learning rates, seeds, and epochs."""

    losses: Sequence[str]
    rates: Sequence[float]
    seeds: Sequence[int]
    epochs: int


#: Hist2ST learns slowest, and so is given twice the epochs.
DEEP = ("mse", "mse-per-mean", "poisson")
PLANS = {
    "linear": Plan(tuple(real.LOSSES), (5e-4, 1e-3, 2e-3, 4e-3, 8e-3), range(5), 30),
    "img2st": Plan(DEEP, (1e-3, 3e-3, 8e-3), range(3), 30),
    "hist2st": Plan(DEEP, (1.5e-3, 4e-3, 1e-2), range(3), 60),
}

#: Settings of `Training` that `tiles.train` uses beside epochs and rate.
USED = {"batch_size", "weight_decay", "warmup_epochs", "clip"}

#: Decoder and loss whose predictions are spoilt for controls, and those that are kept.
SPOILT = ("linear", "poisson")
CONTROLS = (
    "zeros", "training mean", "patch mean", "blurred 8 µm", "blurred 32 µm", "scaled by 2",
    "offset", "offset off tissue", "shuffled",
)  # fmt: skip


def searched(plans: dict[str, Plan]) -> list[real.Fit]:
    """Fits that choose learning rates: without two strips, each of which validates for the other.

    The two have one strip between them, on a ring of strips.
    """
    pairs = [tuple(sorted((s, (s + 2) % real.STRIPS))) for s in range(real.STRIPS)]
    return [
        real.Fit(decoder, loss, lr, plan.seeds[0], pair, plan.epochs)
        for decoder, plan in plans.items()
        for loss, lr, pair in product(plan.losses, plan.rates, pairs)
    ]


def tested(plans: dict[str, Plan], rates: pd.DataFrame) -> list[real.Fit]:
    """Fits that are scored, each at the rate that was chosen without its test strip."""
    best = rates[rates["chosen"]].set_index(["decoder", "loss", "strip"])["lr"]
    return [
        real.Fit(decoder, loss, best[decoder, loss, strip], seed, (strip,), plan.epochs)
        for decoder, plan in plans.items()
        for loss, seed, strip in product(plan.losses, plan.seeds, range(real.STRIPS))
    ]


def chosen_rates(
    fits: Iterable[real.Fit], found: Iterable[dict], strip: np.ndarray
) -> pd.DataFrame:
    """Scores by which learning rates are chosen.

    Parameters
    ----------
    fits, found
        From `searched`, and what each gave.
    strip
        Of each map.

    Returns
    -------
    DataFrame with ``decoder``, ``loss``, ``lr``, ``strip``, which is tested at the rate;
    ``pcc_8um``, the mean over the maps of the strips that validate, a constant map counting as 0;
    and ``chosen``.
    """
    rows = []
    for fit, result in zip(fits, found, strict=True):
        scores = table(result)
        pcc = scores["pcc_8um"].fillna(0).groupby(strip[scores["map"]]).agg(["sum", "size"])
        for test, other in (fit.held_out, fit.held_out[::-1]):
            rows.append((fit.decoder, fit.loss, fit.lr, test, *pcc.loc[other]))
    keys = ["decoder", "loss", "lr", "strip"]
    sums = pd.DataFrame(rows, columns=[*keys, "sum", "maps"]).groupby(keys, sort=False).sum()
    rates = (sums["sum"] / sums["maps"]).rename("pcc_8um").reset_index()
    best = rates.groupby(["decoder", "loss", "strip"])["pcc_8um"].idxmax()
    return rates.assign(chosen=rates.index.isin(best))


# --- one fit --------------------------------------------------------------------------------------


def fitted(tiles: real.Tiles, views: real.Views, fit: real.Fit) -> dict:
    """Train, and score what is held out: seconds, commit, and scores by column."""
    start = time.perf_counter()
    trained = real.train(tiles, views, fit)
    held_out = np.flatnonzero(fit.test(tiles))
    rates = trained.rates(views, held_out)
    maps = {"model": rates}
    if (fit.decoder, fit.loss) == SPOILT and len(fit.held_out) == 1:
        maps |= spoilt(tiles, held_out, rates, trained.gene_rate)
    scores = pd.concat(
        score(tiles, held_out, each, trained.gene_rate).assign(control=name)
        for name, each in maps.items()
    )
    seconds = round(time.perf_counter() - start, 2)
    return {"seconds": seconds, "commit": commit(), "scores": scores.to_dict("list")}


def table(result: dict) -> pd.DataFrame:
    """Scores of a fit, of the model alone where there are controls."""
    scores = pd.DataFrame(result["scores"])
    return scores[scores["control"] == "model"].drop(columns="control")


def spoilt(
    tiles: real.Tiles, chosen: np.ndarray, rates: np.ndarray, mean: np.ndarray
) -> dict[str, Iterator[np.ndarray]]:
    """The controls of `controls.all_controls`, of predictions of all genes in held-out tiles."""
    counts = np.zeros(rates.shape, np.uint8)
    which, where, gene = _places(tiles, chosen)
    counts[where, gene] = tiles.counts[which]
    section = SimpleNamespace(counts=counts, mask=tiles.mask[chosen], truth=None)
    every = controls.all_controls(section, rates, mean)
    return {name: every[name] for name in CONTROLS}


def score(
    tiles: real.Tiles, chosen: np.ndarray, rates: Iterable[np.ndarray], mean: np.ndarray
) -> pd.DataFrame:
    """Scores of the maps of some tiles, of genes that have a mean in training."""
    which, where, gene = _places(tiles, chosen)
    of_map = np.empty((len(which), *tiles.counts.shape[1:]), np.float32)
    for i, each in enumerate(rates):
        of_map[where == i] = each[gene[where == i]]
    known = np.isfinite(mean[gene])
    which, gene, of_map = which[known], gene[known], of_map[known]
    scores = real.score(tiles.counts[which], of_map, tiles.map_mask[which], mean[gene])
    scores.insert(0, "map", which)
    return scores


def _places(tiles: real.Tiles, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Maps of some tiles: numbers, places of their tiles among those, and genes."""
    which = np.flatnonzero(np.isin(tiles.tile, chosen))
    return which, np.searchsorted(chosen, tiles.tile[which]), tiles.gene[which]


# --- many fits ------------------------------------------------------------------------------------

_data: tuple[real.Tiles, real.Views]  # of a worker


def _start(folder: Path) -> None:
    global _data
    torch.set_num_threads(1)
    tiles = real.read_tiles(folder)
    _data = tiles, real.encode(tiles)


def _keep(fit: real.Fit, path: Path) -> None:
    with building(path) as partial:
        partial.write_text(json.dumps({"fit": asdict(fit), **fitted(*_data, fit)}))


def run(fits: Sequence[real.Fit], kept: Path, pool: ProcessPoolExecutor, label: str) -> list[dict]:
    """What every fit gives, made where it is missing."""
    missing = [fit for fit in fits if not (kept / f"{fit.name}.json").is_file()]
    waiting = [pool.submit(_keep, fit, kept / f"{fit.name}.json") for fit in missing]
    for done in track(waiting, label, "fits"):
        done.result()
    return [json.loads((kept / f"{fit.name}.json").read_text()) for fit in fits]


def digests(tiles: real.Tiles) -> tuple[str, str]:
    """SHA-256 of what is trained on, and of it and the code that fits depend on."""
    data = hashlib.sha256(" ".join([*tiles.ids, *tiles.genes]).encode())
    for array in (tiles.he, tiles.mask, tiles.place, tiles.tile, tiles.gene, tiles.counts):
        data.update(np.ascontiguousarray(array))
    whole = data.copy()
    whole.update(code_digest(*CODE).encode())
    return data.hexdigest(), whole.hexdigest()


# --- results --------------------------------------------------------------------------------------


def map_table(tiles: real.Tiles) -> pd.DataFrame:
    """What each map is: tile, strip, gene, counts, and the ceilings of its PCC by splitting."""
    inside = tiles.map_mask
    counts = np.where(inside, tiles.counts, 0)
    bins = inside.sum((1, 2))
    columns = {
        "map": np.arange(len(counts)),
        "tile": tiles.ids[tiles.tile],
        "row": tiles.place[tiles.tile, 0],
        "column": tiles.place[tiles.tile, 1],
        "strip": tiles.strip[tiles.tile],
        "gene": np.array(tiles.genes)[tiles.gene],
        "sparsity": 1 - (counts > 0).sum((1, 2)) / bins,
        "mean_count": counts.sum((1, 2)) / bins,
        "largest": counts.max((1, 2)),
    }
    for name, factor in (("ceiling_2um", 1), ("ceiling_8um", 4)):
        columns[name] = [
            ceilings.split_ceiling(y[None, None], m[None], factor)[0]
            for y, m in zip(counts, inside, strict=True)
        ]
    return pd.DataFrame(columns)


def printed(tiles: real.Tiles) -> pd.DataFrame:
    """Scores of the published predictions; D² against the means that models were trained beside."""
    parts = []
    for strip in range(real.STRIPS):
        test = tiles.strip == strip
        mean = real.gene_rate(tiles, real.trained_on(tiles.place, test))
        chosen = np.flatnonzero(test)
        which, where, gene = _places(tiles, chosen)
        for model, maps in tiles.printed.items():
            rates = np.zeros((len(chosen), len(tiles.genes), *maps.shape[1:]), np.float32)
            rates[where, gene] = maps[which]
            parts.append(score(tiles, chosen, rates, mean).assign(control=f"published {model}"))
    return pd.concat(parts)


def gathered(fits: Sequence[real.Fit], found: Sequence[dict]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores of the models and of the controls, a row per run and map."""
    keys = ["decoder", "loss", "seed", "control", "map"]
    rows = [
        pd.DataFrame(result["scores"]).assign(decoder=fit.decoder, loss=fit.loss, seed=fit.seed)
        for fit, result in zip(fits, found, strict=True)
    ]
    scores = pd.concat(rows).set_index(keys).sort_index().reset_index()
    model = scores["control"] == "model"
    return scores[model].drop(columns="control"), scores[~model]


def write(
    tiles: real.Tiles, rates: pd.DataFrame, fits: Sequence[real.Fit], found: Sequence[dict],
    about: dict,
) -> None:  # fmt: skip
    """Write what the book shows."""
    models, others = gathered(fits, found)
    files = {
        "maps": map_table(tiles),
        "scores": models,
        "controls": pd.concat([others, printed(tiles)]),
        "rates": rates,
    }
    with building(RESULTS) as folder:
        folder.mkdir()
        for name, frame in files.items():
            frame.to_csv(folder / f"{name}.csv", index=False, float_format="%.4g")
        text = json.dumps(about, indent=1)
        (folder / "provenance.json").write_text(text + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all, from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--decoders", nargs="+", choices=PLANS, default=list(PLANS),
                        help="only these are trained and written; default: all")  # fmt: skip
    given = parser.parse_args(arguments)
    tiles = real.read_tiles(given.folder)
    data, whole = digests(tiles)
    kept = KEPT / whole[:16]
    plans = {name: PLANS[name] for name in given.decoders}
    workers = multiprocessing.get_context("spawn")
    start = (given.folder,)
    with alone(KEPT / ".running"), ProcessPoolExecutor(given.cores, workers, _start, start) as pool:
        search = searched(plans)
        found = run(search, kept, pool, "choosing learning rates")
        rates = chosen_rates(search, found, tiles.strip[tiles.tile])
        test = tested(plans, rates)
        found_test = run(test, kept, pool, "training")
    results = [*found, *found_test]
    about = {
        "commit": ", ".join(sorted({result["commit"] for result in results})),
        "tiles": data,
        "plans": {n: {k: list(v) if k != "epochs" else v for k, v in p._asdict().items()}
                  for n, p in plans.items()},
        "settings": test[0].settings().model_dump(include=USED),
        "sizes": real.SIZES,
        "fits": len(results),
        "seconds": round(sum(result["seconds"] for result in results)),
        "hardware": hardware(),
        "packages": {"torch": torch.__version__, "numpy": np.__version__},
    }  # fmt: skip
    write(tiles, rates, test, found_test, about)
    say(str(RESULTS))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
