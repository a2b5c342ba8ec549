"""Check everything a run needs: ``python workflow/doctor.py [--preset NAME] [--cohort FILE]``.

Prints one table of what was found and how to mend it. The exit status is 1 if anything fails.
No check stops another, and nothing is downloaded or written. Only the access to an encoder's
weights is asked for over the network.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path

from doctor_rows import Row, State, failed, guarded, table
from doctor_sections import panel_genes, sections

from sparsity_trap.bins import BIN_UM, PATCH_BINS
from sparsity_trap.presets import load_preset, other_worlds
from sparsity_trap.progress import say
from sparsity_trap.settings import ROOT, Preset, UserError

#: Packages whose version can change a result or whether a file can be read.
PACKAGES = (
    "torch", "torchvision", "timm", "numpy", "scipy", "pandas", "scanpy", "squidpy", "anndata",
    "statsmodels", "zarr", "h5py", "pyarrow", "tifffile", "imagecodecs", "pydantic", "snakemake",
    "papermill", "jupyter-book",
)  # fmt: skip
LOCK = ROOT / "requirements.lock.txt"

#: GB that sections, stores and tokens of a world may take. With real ones, the tokens of about 600
#: patches in 16 views take 6 GB per patient.
_DISK_GB = {"simulated": 1.0, "tissue-map": 1.0, "spaceranger": 50.0}
#: GB of a run's maps of a patch of 50 genes, and patches of a real section, about.
_MAP_GB, _REAL_PATCHES = 1.4e-3, 600
_LEAST_DISK_GB = 1
_GPU_GB = 8


def examine(
    preset: Callable[[], Preset], cohort: Path | None = None, online: bool = True
) -> Iterator[Row]:
    """Carry out every check.

    Parameters
    ----------
    preset
        Gives the preset to be run, or raises ``UserError``.
    cohort
        Cohort file; its sections are checked. Default: those of the preset, where it reads real
        ones.
    online
        Ask Hugging Face whether the encoder's weights can be had. Otherwise nothing leaves this
        computer.
    """
    yield from guarded("Python", python)
    yield from guarded("packages", packages)
    yield from guarded("GPU", gpu)
    settings: Preset | None = None
    try:
        settings = preset()
    except UserError as error:
        yield failed("preset", error)
    if settings is not None:
        yield from guarded("preset", partial(_preset, settings))
        yield from guarded("disk", partial(disk, settings.folder, _needed_gb(settings)))
        yield from guarded("encoder", partial(encoder, settings.encoder.name, online))
        yield from guarded("gene panel", partial(panel, settings))
        yield from guarded("cell-type maps", partial(label_maps, settings))
    yield from guarded("cohort", partial(sections, settings, cohort))


def python() -> Iterator[Row]:
    """Version of Python against the one the lock was made for."""
    found = f"Python {platform.python_version()}"
    sound = (3, 11) <= tuple(sys.version_info[:2]) <= (3, 12)
    yield Row(
        "Python",
        *(("ok", found) if sound else ("FAIL", found, "install Python 3.11 or 3.12, make env")),
    )


def packages(lock: Path = LOCK) -> Iterator[Row]:
    """Installed versions against the lock; a build suffix such as ``+cpu`` does not count."""
    if not lock.is_file():
        raise UserError(f"{lock} does not exist: restore it from the repository")
    locked = dict(re.findall(r"^([\w.-]+)==([^\s;+]+)", lock.read_text(), re.MULTILINE))
    missing, other = [], []
    for name in PACKAGES:
        try:
            installed = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if installed != locked.get(name, installed):
            other.append(f"{name} {installed} (lock: {locked[name]})")
    if missing:
        yield Row("packages", "FAIL", f"not installed: {', '.join(missing)}", "make env")
    if other:
        mend = "make env; results of other versions may differ"
        yield Row("packages", "warn", ", ".join(other), mend)
    if not missing and not other:
        yield Row("packages", "ok", f"{len(PACKAGES)} key packages are those of {lock.name}")


def gpu() -> Iterator[Row]:
    """Whether torch works, and with which accelerator."""
    import torch

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = (size / 1e9 for size in torch.cuda.mem_get_info(i))
            name = torch.cuda.get_device_name(i)
            found = f"torch {torch.__version__}, {name}, {free:.0f} of {total:.0f} GB free"
            if free < _GPU_GB:
                mend = f"end what else runs on it: {_GPU_GB} GB or more; else lower batch_size"
                yield Row("GPU", "warn", found, mend)
            else:
                yield Row("GPU", "ok", found)
    else:
        yield Row("GPU", *_no_gpu(torch.__version__, torch.version.cuda))


def _no_gpu(version: str, cuda: str | None) -> tuple[State, str, str]:
    """Why torch sees no GPU: hidden, none there, a driver that fails, or a torch without CUDA."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        found = f"torch {version}, no GPU: CUDA_VISIBLE_DEVICES is '{hidden}'"
        return "warn", found, "unset it, or name a GPU of this machine, where one is to be used"
    if not shutil.which("nvidia-smi"):
        mend = "enough for the laptop preset; full sections need an NVIDIA GPU"
        return "warn", f"torch {version}, no GPU", mend
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    if done.returncode or "GPU " not in done.stdout:
        said = " ".join((done.stdout + done.stderr).split())[:200] or "it lists none"
        mend = "start or update the driver; on a cluster, ask for a job with a GPU"
        return "warn", f"torch {version}, no GPU, though nvidia-smi is present ({said})", mend
    if cuda is None:
        mend = "remove .venv and say make env, which installs torch with CUDA"
        return "FAIL", f"torch {version} is built without CUDA, though there is a GPU", mend
    mend = f"update the driver to one for CUDA {cuda}"
    return "FAIL", f"torch {version} sees no GPU, though nvidia-smi does", mend


def _needed_gb(preset: Preset) -> float:
    """What the results of a preset and its other worlds may take."""
    real = preset.source == "spaceranger"
    patches = _REAL_PATCHES if real else int(preset.simulation.side_um / (PATCH_BINS * BIN_UM)) ** 2
    places = [preset, *other_worlds(preset).values()]
    maps = sum(len(place.all_runs()) for place in places) * patches * _MAP_GB
    return len(places) * _DISK_GB[preset.source] + maps


def disk(folder: Path, needed: float) -> Iterator[Row]:
    """Free space where results go, GB."""
    existing = next(f for f in (folder, *folder.parents) if f.exists())
    if not os.access(existing, os.W_OK):
        raise UserError(f"{existing} cannot be written: change its owner or permissions")
    free = shutil.disk_usage(existing).free / 1e9
    found = f"{free:.0f} GB free in {existing}"
    mend = f"free some space: the results may take {needed:.0f} GB"
    if free < _LEAST_DISK_GB:
        yield Row("disk", "FAIL", found, mend)
    elif free < needed:
        yield Row("disk", "warn", found, mend)
    else:
        yield Row("disk", "ok", found)


def encoder(name: str, online: bool = True) -> Iterator[Row]:
    """Whether the encoder's weights can be had. A token is looked for, never shown."""
    from sparsity_trap import encoders

    card = encoders.encoder_card(name)
    found = f"{name} ({card.licence or 'licence not stated'})"
    if card.architecture is None:
        yield Row("encoder", "ok", f"{found}, which needs no weights")
        return
    if card.hub is None:
        yield Row("encoder", "ok", f"{found}: timm downloads its weights at first use")
        return
    try:
        here = encoders.check_access(name, online)
    except encoders.Unreachable as error:
        row = failed("encoder", error)
        yield row._replace(state="warn", found=f"access unknown; {row.found}")
        return
    if here:
        yield Row("encoder", "ok", f"{found}: its weights are on this computer")
    elif online:
        yield Row("encoder", "ok", f"{found}: open to you, downloaded at first use")
    else:
        mend = "leave --offline out to try the access"
        yield Row("encoder", "warn", f"{found}: its weights are not on this computer", mend)


def panel(preset: Preset) -> Iterator[Row]:
    """Genes that the preset predicts; `section` compares them with each matrix."""
    genes = panel_genes(preset)
    if genes is None:
        found = f"the {preset.genes.count} most variable genes, chosen at the data step"
        yield Row("gene panel", "ok", found)
    else:
        yield Row("gene panel", "ok", f"{preset.genes.panel}: {len(genes)} genes")


def label_maps(preset: Preset) -> Iterator[Row]:
    """Cell-type maps of the source ``tissue-map``; missing ones are downloaded at first use."""
    from sparsity_trap.runs import LABELS, LABELS_VARIABLE
    from sparsity_trap.simulation.label_map import LABEL_SHA256, find_labels

    folder = Path(os.environ.get(LABELS_VARIABLE, LABELS))
    present = [
        p for p in LABEL_SHA256 if (folder / f"DeconvolutionResults_{p}CRC.csv.gz").is_file()
    ]
    for patient in present:
        find_labels(patient, folder)  # compares checksums
    missing = [p for p in LABEL_SHA256 if p not in present]
    found = f"{', '.join(present) or 'none'} in {folder}"
    if preset.source != "tissue-map":
        yield Row("cell-type maps", "ok", f"{found}; this preset needs none")
    elif missing:
        mend = f"{', '.join(missing)} will be downloaded; without a connection, put them there"
        yield Row("cell-type maps", "warn", found, mend)
    else:
        yield Row("cell-type maps", "ok", found)


def _preset(preset: Preset) -> Iterator[Row]:
    found = f"{preset.name}: {preset.source}, {', '.join(preset.patients)}, "
    yield Row("preset", "ok", found + f"{len(preset.all_runs())} runs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(description="Check everything a run needs.")
    parser.add_argument("--preset", default="laptop", help="name in presets/; default: laptop")
    parser.add_argument("--source", choices=sorted(_DISK_GB), help="in place of the preset's")
    parser.add_argument("--cohort", type=Path, metavar="FILE", help="a cohort file")
    parser.add_argument("--offline", action="store_true", help="ask nothing over the network")
    given = parser.parse_args(arguments)
    preset = partial(load_preset, given.preset, given.source)
    rows = list(examine(preset, given.cohort, not given.offline))
    say(table(rows))
    warned, failed = (sum(row.state == state for row in rows) for state in ("warn", "FAIL"))
    say(f"\n{len(rows)} checks: {failed} failed, {warned} with a warning")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
