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
from sparsity_trap.analysis import comparisons
from sparsity_trap.data.patches import PatchStore
from sparsity_trap.encoders import PATCH_UM_PER_PX
from sparsity_trap.files import building
from sparsity_trap.runs import Result, open_preset, pick, plain, store
from sparsity_trap.settings import POISSON_ARM, Preset, UserError


def numbers(preset: Preset, results: list[Result]) -> dict[str, float | int | str | None]:
    """Settings and sizes that the book quotes, by dotted key such as ``cohort.n_patches.P5``.

    NaN becomes None. Results are quoted by the notebooks that compute them.
    """
    main = preset.main_patient
    e = pick(results, POISSON_ARM, main)
    values: dict[str, object] = {
        "preset.name": preset.name,
        "preset.source": preset.source,
        "preset.main_patient": main,
        "encoder.um_per_px": PATCH_UM_PER_PX,
        "scale.patches": scaling.patches_per_section(),
        "scale.reached": scaling.REACHED,
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
