"""Finished runs as tables, and every number that the book's prose quotes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import zarr

from sparsity_trap import metrics, published, stats, steps
from sparsity_trap.config import Preset, Run, UserError
from sparsity_trap.files import building
from sparsity_trap.patches import PatchStore
from sparsity_trap.provenance import commit, hardware

#: The published contrast: MSE and Poisson at 2 µm.
MSE_ARM, POISSON_ARM = "D", "E"
#: MSE with the Poisson arm's link and bias.
MATCHED_ARM = "D-matched"

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


def run_table(preset: Preset, results: list[Result]) -> pd.DataFrame:
    """One row per run: what it was, the mean of each per-gene score, pooled PCC, size and time."""
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
        row |= result.scores["pooled"]
        row |= {key: result.provenance[key] for key in ("parameters", "epochs", "seconds")}
        rows.append(row)
    return pd.DataFrame(rows)


def numbers(preset: Preset, results: list[Result]) -> dict[str, float | int | str | None]:
    """Flat table of every number quoted in the book; NaN becomes None.

    Keys are dotted and lower-case but for names of arms and patients, e.g. ``arm.E.pcc_8um`` (mean
    over genes on the main patient, within tissue) or ``cohort.n_patches.P5``.
    """
    main = preset.main_patient
    table = run_table(preset, results)
    values: dict[str, object] = {
        "preset.name": preset.name,
        "preset.source": preset.source,
        "preset.main_patient": main,
        "preset.n_runs": len(results),
        "preset.n_arms": len({r.run.arm for r in results}),
        "encoder.name": preset.encoder.name,
    }
    settings = {
        "training": preset.training,
        "decoder": preset.decoder,
        "encoder": preset.encoder,
        "patches": preset.patches,
    }
    if preset.source != "spaceranger":
        settings["simulation"] = preset.simulation
    for name, group in settings.items():
        fields = group.model_dump(mode="json").items()
        values |= {f"{name}.{key}": v for key, v in fields if not isinstance(v, list)}
    for patient in preset.patients:
        values |= _cohort_numbers(preset, patient)
    values["cohort.n_patches"] = sum(values[f"cohort.n_patches.{p}"] for p in preset.patients)
    columns = [c for c in table.columns if table[c].dtype.kind in "fi" and c != "seed"]
    for row in table.to_dict("records"):
        where = "arm" if row["test_patient"] == main else f"patient.{row['test_patient']}"
        values |= {f"{where}.{row['arm']}.{column}": row[column] for column in columns}
    d, e = pick(results, MSE_ARM, main), pick(results, POISSON_ARM, main)
    values |= {
        "decoder.hist2st.parameters": e.provenance["parameters"],
        "training.n_train": e.provenance["training_patches"],
        "training.n_validation": e.provenance["validation_patches"],
        "training.seconds.total": float(table["seconds"].sum()),
        "ssim.zeros": _ssim_of_nothing(preset.store(main)),
    }
    values |= _contrast_numbers("delta", d, e)
    if any(r.run.arm == MATCHED_ARM and r.run.test_patient == main for r in results):
        values |= _contrast_numbers("delta.matched", pick(results, MATCHED_ARM, main), e)
    association = stats.sparsity_association(stats.gene_table(d.genes, e.genes))
    values |= {
        f"sparsity.{key}": getattr(association, key)
        for key in ("rho", "p_value", "ci_low", "ci_high", "n_genes", "n_dropped")
    }
    without = association.without_category.set_index("category")
    values |= {
        f"sparsity.without_mitochondrial.{key}": without.loc["mitochondrial", key]
        for key in ("rho", "p_value")
        if "mitochondrial" in without.index
    }
    rho, n_genes = (published.SUMMARY[key] for key in ("rho", "n_genes"))
    values |= {
        "published.rho": rho,
        "published.p_value": stats.spearman_p_value(rho, n_genes),
    }
    values |= {"run.commit": commit(), "run.hardware": hardware()}
    return {key: _plain(value) for key, value in values.items()}


def _cohort_numbers(preset: Preset, patient: str) -> dict[str, object]:
    store = steps.store(preset, patient)
    tissue, zeros = 0, 0
    for counts, mask in zip(store.counts, store.mask, strict=True):
        tissue += int(mask.sum())
        zeros += int((counts[:, mask] == 0).sum())
    return {
        f"cohort.n_patches.{patient}": len(store),
        f"cohort.n_bins.{patient}": tissue,
        f"cohort.sparsity.{patient}": zeros / (tissue * len(store.genes)),
        f"cohort.registration_px.{patient}": store.registration["patch_rms_px"],
    }


def _contrast_numbers(prefix: str, mse: Result, poisson: Result) -> dict[str, object]:
    """E − D over genes: differences, wins, and the largest gain."""
    table = stats.gene_table(mse.genes, poisson.genes)
    gain = table["delta_pcc_8um"]
    largest = table.loc[gain.idxmax()]
    return {
        f"{prefix}.pcc_8um": gain.mean(),
        f"{prefix}.ssim_2um": table["delta_ssim_2um"].mean(),
        f"{prefix}.n_wins": int((gain > 0).sum()),
        f"{prefix}.n_genes": int(gain.notna().sum()),
        f"{prefix}.best_gene": largest["gene"],
        f"{prefix}.best_gain": largest["delta_pcc_8um"],
    }


def _ssim_of_nothing(store_path: Path) -> float:
    """Mean SSIM at 2 µm of a prediction that is zero everywhere."""
    store = PatchStore(store_path)
    values = []
    for i in range(len(store)):
        counts = store.counts[i : i + 1]
        values.append(metrics.ssim(counts, np.zeros_like(counts), store.mask[i : i + 1]))
    return float(np.nanmean(np.concatenate(values)))


def _plain(value: object) -> float | int | str | None:
    if isinstance(value, (bool, str)) or value is None:
        return value
    if isinstance(value, (int, np.integer)):
        return int(value)
    number = float(value)
    return number if np.isfinite(number) else None


def write_tables(preset: Preset, **tables: pd.DataFrame) -> None:
    """Write tables as CSV into the preset's folder ``tables``, each under its keyword's name."""
    for name, table in tables.items():
        with building(preset.folder / "tables" / f"{name}.csv") as partial:
            table.to_csv(partial, index=False)
