"""Gather every number that the book quotes:

python workflow/write_results.py results/laptop preset=laptop source= cohort=
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from sparsity_trap import runs as results
from sparsity_trap import scaling
from sparsity_trap.analysis import association as stats
from sparsity_trap.analysis import comparisons
from sparsity_trap.data.patches import PatchStore
from sparsity_trap.encoders import PATCH_UM_PER_PX
from sparsity_trap.files import building
from sparsity_trap.runs import Result, open_preset, pick, plain, run_table, store
from sparsity_trap.scores import GeneScores
from sparsity_trap.settings import LOSS_PAIRS, MSE_ARM, POISSON_ARM, Preset, UserError


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
        "ssim.zeros": _ssim_of_nothing(store(preset, main)),
        "run.commit": e.provenance["commit"],
        "run.hardware": e.provenance["hardware"],
    }
    values["panel.n_genes"] = len(e.genes)
    for name in ("simulation", "genes", "patches", "encoder", "decoder", "training"):
        if name != "simulation" or preset.source != "spaceranger":
            fields = getattr(preset, name).model_dump(mode="json").items()
            values |= {f"{name}.{key}": v for key, v in fields if not isinstance(v, list)}
    for patient in preset.patients:
        values |= _cohort_numbers(store(preset, patient))
    values["cohort.n_patches"] = sum(values[f"cohort.n_patches.{p}"] for p in preset.patients)
    for row in run_table(preset, list(here.values())).to_dict("records"):
        values |= {f"arm.{row['arm']}.{key}": value for key, value in row.items()}
    values |= _contrast_numbers("delta", d, e)
    for name, (mse, poisson) in LOSS_PAIRS.items():
        if mse in here and poisson in here:
            values |= _contrast_numbers(f"delta.{name}", here[mse], here[poisson])
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


def _ssim_of_nothing(store: PatchStore) -> float:
    """SSIM at 2 µm of a prediction that is zero everywhere, averaged like that of an arm."""
    scores = GeneScores()
    for counts, mask in zip(store.counts, store.mask, strict=True):
        scores.update(counts[None], np.zeros_like(counts)[None], mask[None])
    return float(np.nanmean(scores.compute()["ssim_2um"]))


def main() -> None:
    folder = Path(sys.argv[1])
    arguments = dict(pair.split("=", 1) for pair in sys.argv[2:])
    preset = open_preset(**arguments)
    runs = results.load_all(preset)
    quoted = numbers(preset, runs) | comparisons.numbers(preset, runs)
    for path in sorted((folder / "numbers").glob("*.json")):  # what notebooks quote
        quoted |= json.loads(path.read_text())
    with building(folder / "numbers.json") as partial:
        partial.write_text(json.dumps(quoted, indent=1))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
