# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% tags=["remove-cell", "parameters"]
preset = "smoke"
source = ""
cohort = ""
arm = "E"
test_patient = "P5"
seed = 0

# %% tags=["remove-cell"]
from IPython.display import Markdown

from sparsity_trap import runs as results
from sparsity_trap.data.sections import open_preset
from sparsity_trap.settings import Run
from sparsity_trap.show import curves, tables

settings = open_preset(preset, source, cohort)
definition = settings.arm(arm)

# %% tags=["remove-input", "title"]
Markdown(f"# Arm {arm}: {definition.title}")

# %% [markdown]
# One run, from the cached tokens of the training patients to predictions for the patient left out. The test patient's section is opened after the checkpoint has been chosen.

# %% tags=["hide-input"]
run = Run(arm=arm, test_patient=test_patient, seed=seed)
result = results.load(settings, run)

# %% tags=["remove-input"]
what = result.provenance
Markdown(
    f"""
| | |
|---|---|
| trained on | {", ".join(what["training_patients"])}: {what["training_patches"]} patches |
| selected on | {what["validation_patches"]} patches of the same patients, along one side of each section |
| tested on | {test_patient} |
| decoder | {definition.decoder}, {what["parameters"]:,} parameters |
| loss, link, initial bias | {definition.loss}, {definition.link}, {definition.bias} |
| epochs | {what["epochs"]}, the best was {what["best_epoch"]} |
| seed | {seed} |
| time | {what["seconds"]:.0f} s on {what["hardware"]} |
"""
)

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Loss and PCC at 8 µm on the held-out blocks of the training patients. The dot is the epoch that was kept."}, "image": {"alt": "Training curves of one run"}}
curves.training_dynamics({arm: result.log}, settings.source)

# %% [markdown]
# ## Scores on the test patient
#
# Means over genes, within tissue unless *unmasked* is said.

# %% tags=["remove-input"]
scores = result.genes[[c for c in results.SCORES if result.genes[c].notna().any()]]
tables.show(scores.agg(["mean", "min", "max"]).T, index=True)
