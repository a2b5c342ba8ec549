"""Finished runs as tables, and every number that the book's prose quotes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import zarr

from sparsity_trap import scaling, steps
from sparsity_trap.analysis import association as stats
from sparsity_trap.analysis import published
from sparsity_trap.data.patches import PatchStore
from sparsity_trap.encoders import PATCH_UM_PER_PX
from sparsity_trap.scores import GeneScores
from sparsity_trap.settings import (
    LOSS_PAIRS,
    MSE_ARM,
    POISSON_ARM,
    Preset,
    Run,
    UserError,
)

#: Per-gene scores averaged into one number per run.
SCORES = (
    "pcc_2um",
    "pcc_8um",
    "pcc_2um_unmasked",
    "pcc_8um_unmasked",
    "ssim_2um",
    "ssim_8um",
    "deviance",
    "mse",
    "pcc_2um_rate",
    "pcc_8um_rate",
)


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
    def predictions(self) -> zarr.Array:
        """Predicted rates, float16 [N, G, 128, 128], patches in store order."""
        return zarr.open_group(self.folder / "predictions.zarr", mode="r")["rate"]


def load(preset: Preset, run: Run) -> Result:
    """Read one run; it is trained first where it does not exist yet."""
    folder = steps.run(preset, run)
    return Result(
        run=run,
        folder=folder,
        genes=pd.read_parquet(folder / "genes.parquet"),
        log=pd.read_json(folder / "log.jsonl", lines=True),
        scores=json.loads((folder / "scores.json").read_text()),
        provenance=json.loads((folder / "provenance.json").read_text()),
    )


def load_all(preset: Preset) -> list[Result]:
    """Every run of the preset, in its order."""
    return [load(preset, run) for run in preset.all_runs()]


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
    runs = [
        run
        for run in preset.all_runs()
        if run.test_patient == preset.main_patient and run.arm in (MSE_ARM, POISSON_ARM)
    ]
    loaded = [load(preset, run) for run in runs]
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
        row["undefined_pcc_8um"] = int(result.genes["pcc_8um"].isna().sum())
        row |= result.scores["pooled"]
        row |= {key: result.provenance[key] for key in ("parameters", "epochs", "seconds")}
        rows.append(row)
    return pd.DataFrame(rows)


def numbers(preset: Preset, results: list[Result]) -> dict[str, float | int | str | None]:
    """Flat table of every number quoted in the book; NaN becomes None.

    Keys are dotted and lower-case but for names of arms and patients, e.g. ``arm.E.pcc_8um`` (mean
    over genes on the main patient, within tissue, lowest seed) or ``cohort.n_patches.P5``.
    """
    main = preset.main_patient
    here = {
        r.run.arm: pick(results, r.run.arm, main) for r in results if r.run.test_patient == main
    }
    d, e = here[MSE_ARM], here[POISSON_ARM]
    values: dict[str, object] = {
        "preset.name": preset.name,
        "preset.source": preset.source,
        "preset.main_patient": main,
        "encoder.um_per_px": PATCH_UM_PER_PX,
        "scale.patches": scaling.patches_per_section(),
        "scale.reached": scaling.REACHED,
        "preset.n_runs": len(results),
        "preset.n_arms": len({r.run.arm for r in results}),
        "training.n_train": e.provenance["training_patches"],
        "training.n_validation": e.provenance["validation_patches"],
        "training.seconds.total": sum(r.provenance["seconds"] for r in results),
        "decoder.hist2st.parameters": e.provenance["parameters"],
        "ssim.zeros": _ssim_of_nothing(steps.store(preset, main)),
        "run.commit": e.provenance["commit"],
        "run.hardware": e.provenance["hardware"],
    }
    values["panel.n_genes"] = len(e.genes)
    for name in ("simulation", "genes", "patches", "encoder", "decoder", "training"):
        if name != "simulation" or preset.source != "spaceranger":
            fields = getattr(preset, name).model_dump(mode="json").items()
            values |= {f"{name}.{key}": v for key, v in fields if not isinstance(v, list)}
    for patient in preset.patients:
        values |= _cohort_numbers(steps.store(preset, patient))
    values["cohort.n_patches"] = sum(values[f"cohort.n_patches.{p}"] for p in preset.patients)
    for row in run_table(preset, list(here.values())).to_dict("records"):
        values |= {f"arm.{row['arm']}.{key}": value for key, value in row.items()}
    values |= _contrast_numbers("delta", d, e)
    for name, (mse, poisson) in LOSS_PAIRS.items():
        if mse in here and poisson in here:
            values |= _contrast_numbers(f"delta.{name}", here[mse], here[poisson])
    values |= _association_numbers(stats.gene_table(d.genes, e.genes))
    values |= {f"published.{key}": value for key, value in published.SUMMARY.items()}
    values["published.p_value"] = stats.spearman_p_value(
        published.SUMMARY["rho"], published.SUMMARY["n_genes"]
    )
    return {key: plain(value) for key, value in values.items()}


def _cohort_numbers(store: PatchStore) -> dict[str, object]:
    tissue, zeros = 0, 0
    digest = hashlib.sha256(" ".join(store.genes).encode())
    for image, counts, mask in zip(store.images, store.counts, store.mask, strict=True):
        for part in (image, counts, mask):
            digest.update(np.ascontiguousarray(part))
        tissue += int(mask.sum())
        zeros += int((counts[:, mask] == 0).sum())
    return {
        f"cohort.n_patches.{store.patient}": len(store),
        f"cohort.sparsity.{store.patient}": zeros / (tissue * len(store.genes)),
        f"cohort.sha256.{store.patient}": digest.hexdigest(),
    }


def _contrast_numbers(prefix: str, mse: Result, poisson: Result) -> dict[str, object]:
    """Poisson − MSE over genes at 8 µm: mean difference, wins, and the largest gain."""
    table = stats.gene_table(mse.genes, poisson.genes)
    gain = table["delta_pcc_8um"]
    largest = table.loc[gain.idxmax()]
    return {
        f"{prefix}.pcc_8um": gain.mean(),
        f"{prefix}.n_wins": int((gain > 0).sum()),
        f"{prefix}.n_genes": int(gain.notna().sum()),
        f"{prefix}.best_gene": largest["gene"],
        f"{prefix}.best_gain": largest["delta_pcc_8um"],
    }


def _association_numbers(table: pd.DataFrame) -> dict[str, object]:
    """Spearman correlation of sparsity and gain, with and without the mitochondrial genes."""
    association = stats.sparsity_association(table)
    keys = (
        "rho", "p_value", "ci_low", "ci_high", "n_genes",
        "partial_rho", "partial_p_value", "sign_p_value",
    )  # fmt: skip
    values = {f"sparsity.{key}": getattr(association, key) for key in keys}
    without = association.without_category.set_index("category")
    for key in ("rho", "p_value"):
        values[f"sparsity.without_mitochondrial.{key}"] = without[key].get("mitochondrial")
    return values


def _ssim_of_nothing(store: PatchStore) -> float:
    """SSIM at 2 µm of a prediction that is zero everywhere, averaged like that of an arm."""
    scores = GeneScores()
    for counts, mask in zip(store.counts, store.mask, strict=True):
        scores.update(counts[None], np.zeros_like(counts)[None], mask[None])
    return float(np.nanmean(scores.compute()["ssim_2um"]))


def plain(value: object) -> float | int | str | None:
    """A value that JSON holds; NaN and infinity become None."""
    if isinstance(value, (bool, str)) or value is None:
        return value
    if isinstance(value, (int, np.integer)):
        return int(value)
    number = float(value)
    return number if np.isfinite(number) else None


def supplementary_tables(preset: Preset) -> dict[str, pd.DataFrame]:
    """Tables S1 (genes), S2 (categories) and S3 (sparsity quartiles) by file name."""
    mse, poisson = contrast(preset)
    genes = stats.gene_table(mse.genes, poisson.genes)
    return {
        "S1_genes": genes,
        "S2_categories": stats.category_table(genes),
        "S3_quartiles": stats.quartile_table(genes),
    }
