"""Presets: every number of a run, in one validated YAML file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

ROOT = Path(__file__).resolve().parent.parent

#: What the simulation writes where Space Ranger writes its version.
SIMULATION = "sparsity-trap simulation"

Source = Literal["simulated", "tissue-map", "spaceranger"]
#: What readers are told that the sections are.
SOURCE_NAMES: dict[str, str] = {
    "simulated": "Simulated sections",
    "tissue-map": "Simulated counts and H&E on real cell-type maps",
    "spaceranger": "Real sections",
}
#: Mark of figures and files whose data are not measured.
MARKS = {"simulated": "SIMULATED DATA", "tissue-map": "SIMULATED COUNTS AND H&E, REAL CELL MAP"}
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Resolution = Literal[2, 4, 8, 16]

#: The published contrast: MSE and Poisson at 2 µm, which differ in loss, link and bias.
MSE_ARM, POISSON_ARM = "D", "E"

#: Arms of the publication's results table, all with Hist2ST.
PUBLISHED_ARMS = ("A", "B", "C", "D", "E", "V7")

#: Pairs of arms that differ in nothing but the loss, where a preset has them.
LOSS_PAIRS = {"matched": ("D-matched", "E"), "linear": ("D-linear", "E-linear")}

#: The head biases of the publication, by the link they were used with.
PUBLISHED_BIAS = {"softplus": 0.0, "exp": -3.0}

#: World of a preset that is the preset itself once more; see `presets.in_world`.
REPEAT = re.compile(r"(seeds|threads)(\d+)|gpu")

#: Presets, patients and arms name folders and files.
NAME = r"[\w][\w.+-]{0,99}"
Name = Annotated[str, Field(pattern=f"^{NAME}$")]


class UserError(Exception):
    """Something the user can mend. The message names the file or key and the remedy."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Simulation(_Strict):
    """A simulated section; used by the sources ``simulated`` and ``tissue-map``."""

    side_um: float = Field(gt=0, le=20_000, description="side of the square capture area, µm")
    pixel_um: float = Field(0.5, ge=0.1, le=2, description="full-resolution pixel size, µm")
    seed: int = 0
    diffusion_um: Positive = Field(4.0, description="s.d. of lateral transcript diffusion, µm")
    library_cv: Positive = Field(
        0.5, description="coefficient of variation of RNA content per cell"
    )
    stripe_sd: float = Field(0.3, ge=0, description="s.d. of log row and column factors, period 2")
    patient_sd: float = Field(
        0.2, ge=0, description="s.d. of log expression shift per gene, patient"
    )
    dispersion: float = Field(
        0.0, ge=0, description="θ of negative binomial counts, variance μ + μ²/θ; 0 is Poisson"
    )
    dispersion_sd: float = Field(0.0, ge=0, le=3, description="s.d. of log θ between genes")
    registration_um: float = Field(
        0.0, ge=0, le=50, description="r.m.s. shift of the counts against the image, µm"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="share of bins that lose a gene's count")
    image_link: Fraction = Field(
        1.0, description="share of a gene's mean that follows what the image shows"
    )

    @model_validator(mode="after")
    def _spread_is_of_something(self) -> Simulation:
        if self.dispersion_sd and not self.dispersion:
            raise ValueError("dispersion_sd spreads θ between genes: give dispersion too")
        return self


class Genes(_Strict):
    """Which genes are predicted."""

    panel: str = Field(
        "paper", description="paper, variable, or the path of a table with a column gene"
    )
    count: Count | None = Field(None, description="number of genes of the panel 'variable'")

    @model_validator(mode="after")
    def _count_belongs_to_variable(self) -> Genes:
        if (self.panel == "variable") != (self.count is not None):
            raise ValueError("give count with panel 'variable', and only there")
        return self


class Patches(_Strict):
    """How a section is cut."""

    min_tissue: Fraction = Field(0.05, description="least share of tissue bins in a patch")


class Encoder(_Strict):
    """The frozen encoder and the augmented views it sees once."""

    name: str = Field("filterbank", description="a name in encoders.yaml, or timm:<name>")
    rehearsal: str | None = Field(
        None, description="takes the place of name for simulated sections, which need no weights"
    )
    dihedral: bool = Field(True, description="cache all eight flips and rotations")
    jitter_views: int = Field(1, ge=0, description="colour-jittered copies per dihedral view")
    jitter: tuple[Fraction, Fraction, Fraction, Annotated[float, Field(ge=0, le=0.5)]] = Field(
        (0.1, 0.1, 0.1, 0.02), description="brightness, contrast, saturation, hue"
    )


class Training(_Strict):
    """Optimisation, shared by every arm."""

    epochs: Count
    batch_size: Count = 8
    accumulate: Count = 4
    lr: Positive = 5e-5
    weight_decay: float = Field(1e-4, ge=0)
    warmup_epochs: int = Field(2, ge=0)
    patience: Count = 10
    clip: Positive = 1.0
    validation: Fraction = Field(0.2, description="share of each training section held out")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="arithmetic of the decoder; losses are computed in float32"
    )


class Decoder(_Strict):
    """Size of the decoder; Hist2ST uses all, Img2ST its width, linear none."""

    hidden: int = Field(512, ge=1, le=16_384)
    heads: Count = 8
    layers: int = Field(8, ge=1, le=256, description="of attention")
    neighbours: Count = 8
    dropout: Fraction = 0.1

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Decoder:
        if self.hidden % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide hidden ({self.hidden})")
        return self


class Arm(_Strict):
    """One cell of the comparison."""

    title: str
    decoder: Literal["hist2st", "img2st", "linear"] = "hist2st"
    loss: Literal[
        "mse", "mse-log1p", "poisson", "nb",
        "power-0", "power-0.5", "power-1", "power-1.5", "power-2",
        "l1", "sqrt", "presence", "hurdle", "zinb", "poisson-depth",
        "pearson", "mse+pearson", "mse+ssim", "multinomial", "multinomial-depth",
    ]  # fmt: skip
    link: Literal["softplus", "exp"]
    bias: float | Literal["gene-mean"] = Field(
        description="initial η of every gene, or the η whose rate is the gene's training mean"
    )
    resolutions_um: tuple[Resolution, ...] = Field(
        (2,), min_length=1, description="bin widths at which the loss compares, averaged"
    )
    masked: bool = Field(True, description="average the loss over tissue bins only")
    gene_weight: Literal["none", "mean", "1/mean", "1/variance"] = Field(
        "none", description="weight of each gene's loss, from its counts in the training patches"
    )
    keep: float = Field(
        1.0, gt=0, le=1, description="share of training UMIs kept by binomial thinning"
    )
    bicubic_from_um: Literal[4, 8, 16] | None = Field(
        None, description="predict bins of this width and interpolate them to 2 µm"
    )
    lr_times: Positive = Field(1.0, description="factor on training.lr")
    epochs_times: Positive = Field(1.0, description="factor on training.epochs and patience")

    def training(self, shared: Training) -> Training:
        """Optimisation of this arm, from that which the arms share."""
        lengths = {"epochs": shared.epochs, "patience": shared.patience}
        longer = {key: max(1, round(n * self.epochs_times)) for key, n in lengths.items()}
        return shared.model_copy(update={"lr": shared.lr * self.lr_times, **longer})


class Runs(_Strict):
    """Arms to train for the given test patients and seeds."""

    arms: list[Name] = Field(min_length=1)
    test_patients: list[Name] = Field(min_length=1)
    seeds: list[int] = Field([0], min_length=1)
    claims: bool = Field(False, description="claims are judged on them, so repeats repeat them")


class World(_Strict):
    """Other simulated sections on which a preset's comparison is run once more."""

    title: str
    simulation: dict[str, Any] = Field(
        min_length=1, description="keys of the preset's simulation that differ, and their values"
    )
    runs: list[Runs] = Field(min_length=1)


class Run(_Strict):
    """One training run."""

    arm: str
    test_patient: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.test_patient}-s{self.seed}"


class Places(_Strict):
    """Where a preset of this name and source keeps what it computes."""

    name: str
    source: Source = "simulated"

    @property
    def world(self) -> str:
        """Name of the world that this is, empty for the preset itself."""
        return self.name.partition("/")[2]

    @property
    def folder(self) -> Path:
        """Everything this preset computes lies here, its worlds' too; safe to delete."""
        home = ROOT / "results" / self.name.partition("/")[0]
        return home / "worlds" / self.world if self.world else home

    @property
    def cohort_folder(self) -> Path:
        """Folder of what is made before training, which a repeat shares."""
        return ROOT / "results" / self.name.partition("/")[0] if self.repeats else self.folder

    @property
    def repeats(self) -> bool:
        """Whether this is a preset once more, and no world of its own."""
        return REPEAT.fullmatch(self.world) is not None

    def outs(self, patient: str) -> Path:
        """Space Ranger folder of one patient."""
        parent = ROOT / "data" if self.source == "spaceranger" else self.cohort_folder
        return parent / "sections" / patient / "outs"

    def store(self, patient: str) -> Path:
        """Patch store of one patient."""
        return self.cohort_folder / "stores" / f"{patient}.zarr"

    @property
    def panel_file(self) -> Path:
        """Variable genes chosen on the training patients."""
        return self.cohort_folder / "panel.csv"

    def tokens(self, patient: str) -> Path:
        """Token cache of one patient."""
        return self.cohort_folder / "tokens" / patient

    def run_dir(self, run: Run) -> Path:
        """Folder of one training run."""
        return self.folder / "runs" / run.name


class Preset(Places):
    """A whole run of the project; see ``presets/laptop.yaml`` for a commented example."""

    patients: list[Name]
    main_patient: Name = Field(description="test patient shown in figures and tables")
    cohort_file: Path | None = Field(
        None, description="where real sections lie; default data/sections/<patient>/outs"
    )
    simulation: Simulation
    genes: Genes = Genes()
    patches: Patches = Patches()
    encoder: Encoder = Encoder()
    decoder: Decoder = Decoder()
    training: Training
    arms: dict[Name, Arm] = Field(description="those of presets/arms.yaml and the preset's own")
    runs: list[Runs]
    worlds: dict[Name, World] = Field(
        {}, description="the same comparison on other simulated sections; real ones have none"
    )
    _home: Preset | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _runs_are_possible(self) -> Preset:
        for group in self.runs:
            for arm in group.arms:
                if arm not in self.arms:
                    choices = ", ".join(self.arms)
                    raise ValueError(f"runs: arm '{arm}' does not exist; arms are {choices}")
            for patient in group.test_patients:
                if patient not in self.patients:
                    choices = ", ".join(self.patients)
                    raise ValueError(
                        f"runs: test patient '{patient}' is not one of patients {choices}"
                    )
        if self.main_patient not in self.patients:
            raise ValueError(f"main_patient '{self.main_patient}' is not one of patients")
        if len(set(self.patients)) < max(2, len(self.patients)):
            raise ValueError("patients: name at least two, each once; one is left out for testing")
        elsewhere = {r.test_patient for r in self.all_runs()} - {self.main_patient}
        if self.genes.panel == "variable" and elsewhere:
            raise ValueError(
                f"genes.panel 'variable' is chosen without the test patient {self.main_patient}; "
                f"take test patient '{min(elsewhere)}' out of runs"
            )
        tested = {r.arm for r in self.all_runs() if r.test_patient == self.main_patient}
        missing = {MSE_ARM, POISSON_ARM} - tested
        if missing and not self.world:
            raise ValueError(
                f"runs: add arm '{min(missing)}' with test patient '{self.main_patient}'; every "
                f"figure compares {MSE_ARM} and {POISSON_ARM} on the main patient"
            )
        return self

    @model_validator(mode="after")
    def _arms_mean_what_the_book_says(self) -> Preset:
        for name, loss in ((MSE_ARM, "mse"), (POISSON_ARM, "poisson")):
            if self.arms[name].loss != loss:
                raise ValueError(f"arms.{name}: loss must be '{loss}'; give another arm a new name")
        for mse, poisson in LOSS_PAIRS.values():
            if mse in self.arms and poisson in self.arms:
                a, b = (self.arms[n].model_dump(exclude={"title"}) for n in (mse, poisson))
                if (a.pop("loss"), b.pop("loss")) != ("mse", "poisson") or a != b:
                    raise ValueError(
                        f"arms.{mse}: must be arm {poisson} with loss 'mse'; only the loss may "
                        "differ"
                    )
        return self

    @property
    def home(self) -> Preset | None:
        """Of a world, the preset that it belongs to."""
        return self._home

    def all_runs(self) -> list[Run]:
        """Every run of the preset, once each, in order."""
        runs = [
            Run(arm=arm, test_patient=patient, seed=seed)
            for group in self.runs
            for patient in group.test_patients
            for seed in group.seeds
            for arm in group.arms
        ]
        return list(dict.fromkeys(runs))

    def training_patients(self, test_patient: str) -> list[str]:
        """All patients but the one that is tested; ``UserError`` when the preset lacks that one."""
        self.check_patient(test_patient)
        return [p for p in self.patients if p != test_patient]

    def check_patient(self, name: str) -> None:
        """Raise ``UserError`` when there is no such patient."""
        if name not in self.patients:
            raise UserError(
                f"patient '{name}' is not in preset '{self.name}': choose one of "
                f"{', '.join(self.patients)}"
            )

    def arm(self, name: str) -> Arm:
        """Arm by name; ``UserError`` when it does not exist."""
        if name not in self.arms:
            raise UserError(
                f"arm '{name}' does not exist in preset '{self.name}': choose one of "
                f"{', '.join(self.arms)}"
            )
        return self.arms[name]


def as_json(model: BaseModel) -> str:
    """Stable JSON text of a settings object, titles left out: they change no result."""
    return json.dumps(model.model_dump(mode="json", exclude={"title"}), sort_keys=True)
