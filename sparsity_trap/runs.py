"""Results of a preset: each computed where it is missing or was made from something else.

The workflow calls these functions in order through the notebooks. A notebook opened on its own
calls the same ones. Each result has a recipe: the settings that it depends on, a digest of the code
that made it, and the recipes of what it was made from. A result whose recipe is not the present one
is computed again, so a notebook is right whoever opens it, and whatever was edited before.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import zarr

from sparsity_trap import recipes
from sparsity_trap.data.genes import choose_variable_genes
from sparsity_trap.data.genes import panel as read_panel
from sparsity_trap.data.patches import PatchStore, write_store
from sparsity_trap.data.sections import (
    Section,
    check_distinct,
    check_section,
    open_preset,
    real_section,
    real_sections,
)
from sparsity_trap.data.spaceranger import read_8um_table
from sparsity_trap.files import alone, building
from sparsity_trap.quotes import Quotes
from sparsity_trap.settings import (
    LOSS_PAIRS,
    MSE_ARM,
    POISSON_ARM,
    PUBLISHED_BIAS,
    ROOT,
    Preset,
    Run,
    UserError,
)

__all__ = [
    "Quotes", "Result", "collapsed", "contrast", "kept_table", "load", "load_all", "long_table",
    "matched", "of_arm", "open_preset", "panel", "pick", "run", "run_table", "section", "store",
    "tokens",
]  # fmt: skip

#: Folder of the cell-type maps of the source ``tissue-map``, relative to the repository.
LABELS_VARIABLE = "SPARSITY_TRAP_LABELS"
LABELS = ROOT / "data" / "crc_8um_labels"

#: Per-gene scores averaged into one number per run.
SCORES = (
    "pcc_2um", "pcc_8um", "pcc_2um_unmasked", "pcc_8um_unmasked", "ssim_2um", "ssim_8um",
    "deviance", "mse", "pcc_2um_rate", "pcc_8um_rate",
)  # fmt: skip


# --- computed where it is missing -----------------------------------------------------------------


def section(preset: Preset, patient: str) -> Section:
    """Files of a patient's section; simulated first where the source is a simulation."""
    preset.check_patient(patient)
    if preset.source == "spaceranger":
        return real_section(preset, patient)
    outs = preset.outs(patient)

    def simulate() -> None:
        from sparsity_trap.simulation.section import simulate_section

        labels = Path(os.environ.get(LABELS_VARIABLE, LABELS))
        simulate_section(outs, patient, preset.simulation, source=preset.source, labels=labels)

    _make(preset, "section", patient, outs, recipes.of_section(preset, patient), simulate)
    return Section(outs=outs)


def panel(preset: Preset) -> pd.DataFrame:
    """Genes of the preset; variable ones are chosen first, without looking at the main patient."""
    if preset.genes.count is None:
        return read_panel(preset)
    path, patients = preset.panel_file, preset.training_patients(preset.main_patient)

    def choose() -> None:
        tables = {p: read_8um_table(section(preset, p).outs) for p in patients}
        chosen = choose_variable_genes(tables, preset.genes.count)
        with building(path) as partial:
            chosen.to_csv(partial, index=False)

    _make(preset, "panel", "genes", path, recipes.of_panel(preset), choose)
    return read_panel(preset)


def store(preset: Preset, patient: str) -> PatchStore:
    """Patch store of a patient; real sections pass the guards of `data.sections` first."""
    files, path = section(preset, patient), preset.store(patient)

    def cut() -> None:
        if preset.source == "spaceranger":
            check_section(patient, files)
            check_distinct(patient, real_sections(preset))
        write_store(
            files.open(),
            panel(preset)["gene"],
            path,
            patient=patient,
            source=preset.source,
            settings=preset.patches,
            mask=files.mask,
        )

    _make(preset, "store", patient, path, recipes.of_store(preset, patient), cut)
    return PatchStore(path)


def tokens(preset: Preset, patient: str) -> Path:
    """Token cache of a patient; in another world that of the same images at home, where it is."""
    cut, path = store(preset, patient), preset.tokens(patient)

    def encode() -> None:
        from sparsity_trap.encoders import cache_tokens  # here: who reads results needs no torch

        home = preset.home
        if not (home and _has_tokens(home, patient, cut)):
            return cache_tokens(cut.path, path, preset.encoder)
        with building(path) as partial:
            shutil.copytree(home.tokens(patient), partial, copy_function=os.link)

    _make(preset, "tokens", patient, path, recipes.of_tokens(preset, patient), encode)
    return path


def _has_tokens(preset: Preset, patient: str, cut: PatchStore) -> bool:
    """Whether a preset has tokens of the very images of a store."""
    note, recipe = _note(preset, "tokens", patient), recipes.of_tokens(preset, patient)
    if not _is_made(note, preset.tokens(patient), recipe):
        return False
    return np.array_equal(PatchStore(preset.store(patient)).images[:], cut.images[:])


def run(preset: Preset, this: Run) -> Path:
    """Folder of a finished training run."""
    preset.arm(this.arm)
    preset.check_patient(this.test_patient)
    folder = preset.run_dir(this)

    def fit() -> None:
        from sparsity_trap.training import train

        for patient in preset.patients:
            tokens(preset, patient)
        train(preset, this)

    _make(preset, "run", this.name, folder, recipes.of_run(preset, this), fit)
    return folder


def kept_table(
    preset: Preset, name: str, made_from: Run | str, compute: Callable[[], pd.DataFrame]
) -> pd.DataFrame:
    """A table that takes long and that several pages read, kept as ``tables/<name>.parquet``.

    Parameters
    ----------
    preset, name
        Of the table.
    made_from
        The run, or the patient whose store, it is computed from.
    compute
        Computes it where it is missing, or was made from something else.
    """
    path = preset.folder / "tables" / f"{name}.parquet"
    of_store = isinstance(made_from, str)
    source = recipes.of_store(preset, made_from) if of_store else recipes.of_run(preset, made_from)

    def write() -> None:
        with building(path) as partial:
            compute().to_parquet(partial, index=False)

    _make(preset, "table", name, path, recipes.recipe("table", source), write)
    return pd.read_parquet(path)


def _make(
    preset: Preset, kind: str, name: str, path: Path, recipe: str, make: Callable[[], object]
) -> None:
    """Compute a result unless it is there and was made by the same recipe.

    Two notebooks may miss the same result: the second waits for the first, and finds it.
    """
    note = _note(preset, kind, name)

    def made() -> bool:
        return _is_made(note, path, recipe)

    if made():
        return
    with alone(note.with_name(f".{note.name}.lock")):
        if made():
            return
        note.unlink(missing_ok=True)  # a result without a note counts as missing
        make()
        with building(note) as partial:
            partial.write_text(recipe)


def _note(preset: Preset, kind: str, name: str) -> Path:
    """Where the recipe of a result stands."""
    folder = preset.folder if kind in ("run", "table") else preset.cohort_folder
    return folder / "recipes" / f"{kind}-{name}"


def _is_made(note: Path, path: Path, recipe: str) -> bool:
    return path.exists() and note.is_file() and note.read_text() == recipe


# --- finished runs --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One finished run, read from its folder.

    Attributes
    ----------
    run
        Arm, test patient and seed.
    folder
        Where it lies.
    genes
        Per-gene scores on the test patient, panel order.
    log
        One row per epoch.
    scores
        Pooled PCC and counts of undefined values.
    provenance
        What ran, on what, with what.
    """

    run: Run
    folder: Path
    genes: pd.DataFrame
    log: pd.DataFrame
    scores: dict
    provenance: dict

    @property
    def patches(self) -> np.ndarray:
        """Sums of each patch at 8 µm, float64 [N, G, 6], as `scores.GeneScores.patches`."""
        return np.load(self.folder / "patches.npy", mmap_mode="r")

    @property
    def predictions(self) -> zarr.Array:
        """Predicted rates, float16 [N, G, 128, 128], patches in store order."""
        return zarr.open_group(self.folder / "predictions.zarr", mode="r")["rate"]


def collapsed(genes: pd.DataFrame, keep: float = 1.0) -> bool:
    """Whether a run ended in maps without information, for more than half of its genes.

    A gene's map is without information when it is flat (the rate varies over 2 µm tissue bins by
    less than `FLAT` of its mean), or when it is empty (a total below `EMPTY` of what is expected)
    and what is left of it does not correlate (PCC at 8 µm below `NULL_PCC`).

    Parameters
    ----------
    genes
        Per-gene scores of the run.
    keep
        Share of the UMIs that it was trained on, so of the total to expect.
    """
    flat = ~(genes["rate_cv"] >= FLAT)  # NaN where the total is 0
    empty = ~(genes["calibration"] >= EMPTY * keep)
    lost = flat | empty & ~(genes["pcc_8um"] >= NULL_PCC)
    return bool(lost.mean() > 0.5)


def load(preset: Preset, this: Run) -> Result:
    """Read one run; it is trained first where it does not exist yet."""
    return read(run(preset, this), this)


def read(folder: Path, this: Run) -> Result:
    """Read the folder of a finished run, whatever it was made by."""
    return Result(
        run=this,
        folder=folder,
        genes=pd.read_parquet(folder / "genes.parquet"),
        log=pd.read_json(folder / "log.jsonl", lines=True),
        scores=json.loads((folder / "scores.json").read_text()),
        provenance=json.loads((folder / "provenance.json").read_text()),
    )


def of_arm(preset: Preset, arm: str, test_patients: str = "", seeds: str = "") -> list[Run]:
    """Runs of one arm, in the preset's order.

    Parameters
    ----------
    preset, arm
        Whose runs.
    test_patients, seeds
        Separated by commas; empty, those that the preset trains this arm for, or the main patient
        and seed 0 where it does not train it.

    Raises
    ------
    UserError
        A patient is not in the preset, or a seed is no number.
    """
    preset.arm(arm)
    planned = [this for this in preset.all_runs() if this.arm == arm]
    if not test_patients and not seeds and planned:
        return planned
    try:
        numbers = [int(seed) for seed in seeds.split(",")] if seeds else []
    except ValueError:
        raise UserError(f"seeds must be whole numbers, such as 0,1, not '{seeds}'") from None
    patients = test_patients.split(",") if test_patients else [r.test_patient for r in planned]
    chosen = []
    for patient in patients or [preset.main_patient]:
        preset.check_patient(patient)
        own = numbers or [r.seed for r in planned if r.test_patient == patient] or [0]
        chosen += [Run(arm=arm, test_patient=patient, seed=seed) for seed in own]
    return list(dict.fromkeys(chosen))


#: Columns of a run's per-gene table that are no scores.
FACTS = ("gene", "category", "sparsity", "mean_count", "auprc_base", "calibration", "rate_cv")

#: What a map without information is; see `collapsed`.
FLAT, EMPTY, NULL_PCC = 0.05, 0.1, 0.05


def load_all(preset: Preset) -> list[Result]:
    """Every run of the preset, in its order."""
    return [load(preset, this) for this in preset.all_runs()]


def pick(results: list[Result], arm: str, patient: str) -> Result:
    """Run of an arm on a test patient with the lowest seed."""
    found = [r for r in results if r.run.arm == arm and r.run.test_patient == patient]
    if not found:
        raise UserError(
            f"no run of arm '{arm}' with test patient '{patient}': add it to 'runs' of the preset"
        )
    return min(found, key=lambda r: r.run.seed)


def contrast(preset: Preset) -> tuple[Result, Result]:
    """The published contrast on the main patient: the runs of arms D (MSE) and E (Poisson)."""
    loaded = [
        load(preset, this)
        for this in preset.all_runs()
        if this.test_patient == preset.main_patient and this.arm in (MSE_ARM, POISSON_ARM)
    ]
    return tuple(pick(loaded, arm, preset.main_patient) for arm in (MSE_ARM, POISSON_ARM))


def matched(preset: Preset, results: list[Result]) -> tuple[Result, ...]:
    """The main patient's run of MSE with the link and bias of arm E, where the preset has it."""
    arm, main = LOSS_PAIRS["matched"][0], preset.main_patient
    found = [r for r in results if (r.run.arm, r.run.test_patient) == (arm, main)]
    return (pick(found, arm, main),) if found else ()


def run_table(preset: Preset, results: list[Result]) -> pd.DataFrame:
    """One row per run: what it was, the mean of each per-gene score, pooled PCC, size and time.

    Means are over the genes with a defined score; ``undefined_pcc_8um`` counts the others.
    """
    rows = []
    for result in results:
        arm = preset.arm(result.run.arm)
        row: dict[str, object] = {
            **result.run.model_dump(),
            "title": arm.title,
            "decoder": arm.decoder,
            "loss": arm.loss,
            "link": arm.link,
            "bias": arm.bias,
        }
        row |= {score: result.genes[score].mean() for score in SCORES}
        row["collapsed"] = collapsed(result.genes, arm.keep)
        row["undefined_pcc_8um"] = int(result.genes["pcc_8um"].isna().sum())
        row |= result.scores["pooled"]
        row |= {key: result.provenance[key] for key in ("parameters", "epochs", "seconds")}
        rows.append(row)
    return pd.DataFrame(rows)


def long_table(preset: Preset, results: list[Result]) -> pd.DataFrame:
    """One row per run and gene: what the run was, and the gene's scores.

    A run that `collapsed` has no scores here, only facts: its maps say nothing, and the score of
    nothing is no effect. It is counted instead.

    Returns
    -------
    DataFrame with columns ``run``, ``arm``, ``patient``, ``seed``, ``collapsed``, the settings of
    the arm (``bias`` is "published" for the publication's bias of that link, ``bias_value`` the
    number itself), and those of the per-gene table.
    """
    parts = []
    for result in results:
        arm = preset.arm(result.run.arm)
        settings = arm.model_dump(exclude={"title", "resolutions_um"})
        if arm.bias == PUBLISHED_BIAS[arm.link]:
            settings["bias"] = "published"
        settings["bias_value"] = arm.bias
        bin_um = arm.resolutions_um[0] if len(arm.resolutions_um) == 1 else np.nan
        failed = collapsed(result.genes, arm.keep)
        genes = result.genes
        if failed:
            genes = genes.assign(**dict.fromkeys(genes.columns.difference(FACTS), np.nan))
        parts.append(
            genes.assign(
                run=result.run.name,
                collapsed=failed,
                arm=result.run.arm,
                patient=result.run.test_patient,
                seed=result.run.seed,
                bin_um=bin_um,
                **settings,
            )
        )
    return pd.concat(parts, ignore_index=True)
