# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Collapse and recovery

# %% tags=["remove-cell", "parameters"]
preset = "smoke"
source = ""
cohort = ""

# %% tags=["remove-cell"]
from sparsity_trap import runs as results
from sparsity_trap.analysis import association as stats
from sparsity_trap.analysis import published
from sparsity_trap.data.sections import open_preset
from sparsity_trap.settings import PUBLISHED_ARMS
from sparsity_trap.show import figures, interactive, tables

SHOWN = (*PUBLISHED_ARMS, "D-matched", "D-linear", "E-linear", "E-img2st")
settings = open_preset(preset, source, cohort)
patient = settings.main_patient
runs = results.load_all(settings)
mse, poisson = results.contrast(settings)
genes = stats.gene_table(mse.genes, poisson.genes)
store = results.store(settings, patient)

# %% [markdown]
# Arm E (Poisson) differs from arm D (squared error) by {val}`delta.pcc_8um:+.3f` in mean per-gene PCC at 8 µm on patient {val}`preset.main_patient`, and is higher on
# {val}`delta.n_wins` of {val}`delta.n_genes` genes. The published difference is {val}`published.mean_delta:+.3f`, on {val}`published.n_wins` of {val}`published.n_genes` genes.
# D and E differ in loss, link and initial bias at once; arms named *matched*, where the preset has them, separate these.

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-collapse", "caption": "Collapse and recovery. **a** One patch and gene at 8 µm: H&E, counts, and both predictions on the counts' colour scale. **b** Every gene's PCC at 8 µm within tissue. **c** Means over genes."}, "image": {"alt": "Maps of one gene under both losses, and per-gene PCC of all genes"}}
gene = genes.loc[genes["delta_pcc_8um"].idxmax(), "gene"]
figures.collapse_and_recovery(genes, store, mse.predictions, poisson.predictions, gene)

# %% [markdown]
# In {numref}`fig-collapse`, panel a shows the gene that gains most in this run, so it is the most favourable case, not a typical one. Panel b shows them all.
#
# PCC at 8 µm of every gene under any two arms, on the main patient; genes above the line are predicted better by the arm on the vertical axis. A click opens the gene in the [browser](05b_browser).

# %% tags=["remove-input"]
of_patient = [r for r in runs if (r.run.test_patient, r.run.seed) == (patient, mse.run.seed)]
arms = {f"arm {r.run.arm}": r.genes["pcc_8um"] for r in of_patient if r.run.arm in SHOWN}
across, up = ({first: arms[first], **arms} for first in ("arm D", "arm E"))
plot, choices = interactive.gene_scatter(genes, across, up, settings.source, diagonal=True)
interactive.show(plot, "arms", gene_page="05b_browser.html", choices=choices)

# %% [markdown]
# ## All runs
#
# Arms of the factorial and the dial have pages of their own; all arms are in [](../methods.md). Per-gene scores are means over the genes with a defined score; the others are counted for PCC at 8 µm. *Pooled* is one correlation over all genes and bins, as the publication reports at 2 µm; differences between genes dominate it.
# *Unmasked* follows the published protocol, which scores bins off the tissue too. *Rate* compares with the true rate where it is known.

# %% tags=["remove-input"]
columns = [
    "arm", "title", "test_patient", "pcc_2um", "pcc_8um", "pcc_8um_unmasked", "pooled_pcc_2um",
    "ssim_2um", "ssim_8um", "pcc_8um_rate", "undefined_pcc_8um", "epochs", "seconds",
]  # fmt: skip
table = results.run_table(settings, [r for r in runs if r.run.arm in SHOWN])
table = table[columns].dropna(axis=1, how="all").astype({"seconds": int})
tables.show(table, missing="undefined", sortable=True)

# %% [markdown]
# :::{when} arm.E-linear.pcc_8um
# The linear decoder is one matrix from a token to its bins. With the loss, link and bias of arm E it has a PCC at 8 µm of {val}`arm.E-linear.pcc_8um:.3f`, against {val}`arm.E.pcc_8um:.3f` for Hist2ST.
# A deep decoder that does not pass it has not been worth its depth on these data.
# :::
#
# ## Published values
#
# For comparison: patient P5, real sections, Virchow2. PCC is pooled over genes and, at 8 µm, includes bins off the tissue. The publication quotes Img2ST-Net with
# {val}`published.img2st_pcc_8um:.3f` at 8 µm; its own per-gene means at 8 µm are {val}`published.pcc_8um_mse:.3f` (D) and {val}`published.pcc_8um_poisson:.3f` (E).

# %% tags=["remove-input"]
tables.show(published.ARMS)

# %% [markdown]
# ## Training dynamics
#
# Each arm is selected by its own loss. Losses of different arms have different units, so the left panel of {numref}`fig-dynamics` shows for each how much of its fall is still to come; the right panel is comparable. Arm B is arm A, interpolated, so their curves are one.

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-dynamics", "caption": "Training dynamics of these arms on the main patient's training sections, on the held-out blocks of the training patients."}, "image": {"alt": "Held-out loss and PCC by epoch"}}
logs = {r.run.arm: r.log for r in of_patient if r.run.arm in SHOWN}
figures.training_dynamics(logs, settings.source)

# %% [markdown]
# ## What an empty map scores
#
# SSIM at 2 µm of a map that is zero everywhere is {val}`ssim.zeros:.3f` on these patches. Arm D has {val}`arm.D.ssim_2um:.3f` and arm E {val}`arm.E.ssim_2um:.3f`.
# A score that rewards emptiness cannot carry the claim by itself; see [](../problem.md).
