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
test_patients = ""
seeds = ""

# %% tags=["remove-cell"]
from IPython.display import Markdown

from sparsity_trap import runs

settings = runs.open_preset(preset, source, cohort)
definition = settings.arm(arm)

# %% tags=["remove-input", "title"]
Markdown(f"# Arm {arm}: {definition.title}")

# %% [markdown]
# One decoder, one loss, and every run of the arm: trained with one patient left out, on the cached tokens of the others. A test patient's section is opened after the checkpoint has been chosen.

# %%
import pandas as pd
import torch
from matplotlib.ticker import MaxNLocator

import sparsity_trap as st
from sparsity_trap.decoders import build_decoder
from sparsity_trap.encoders import open_tokens
from sparsity_trap.show import style, tables
from sparsity_trap.training import training_mean

style.use()
chosen = runs.of_arm(settings, arm, test_patients, seeds)
quote = runs.Quotes(settings, f"02_train_{arm}")

# %% [markdown]
# ## Decoder and loss
#
# Those of the first run, at their start.

# %%
first = chosen[0]
others = settings.training_patients(first.test_patient)
for patient in others:
    runs.tokens(settings, patient)
store = runs.store(settings, others[0])
encoded, views = open_tokens(settings, others[0])
start = definition.bias
if start == "gene-mean":
    start = st.losses.initial_eta(torch.tensor(training_mean(settings, first)), definition.link)

# %%
torch.manual_seed(first.seed)
decoder = build_decoder(
    definition.decoder,
    channels=encoded.shape[2],
    genes=len(store.genes),
    bias=start,
    **settings.decoder.model_dump(),  # hidden, heads, layers, neighbours, dropout
)

# %%
objective = st.Objective(
    definition.loss,
    link=definition.link,
    genes=len(store.genes),
    resolutions_um=definition.resolutions_um,
    masked=definition.masked,
)

# %%
parts = {name: sum(p.numel() for p in part.parameters()) for name, part in decoder.named_children()}
parts |= {name: part.numel() for name, part in decoder.named_parameters(recurse=False)}
parts = pd.Series(parts, name="parameters").loc[lambda n: n > 0]
quote(f"decoder.{definition.decoder}", parameters=parts.sum())
tables.show(
    pd.concat([parts, pd.Series({"all": parts.sum()}, name="parameters")]).to_frame(), index=True
)

# %% [markdown]
# ## One step by hand
#
# Two patches of a training section: standardised tokens, the linear output η, the rate λ that the link makes of it, the loss over tissue bins, and what each gene contributes to the gradient on η. Training standardises over all of its patches instead of these two, and thins the counts in the arms of the sparsity dial.

# %%
tokens = torch.tensor(encoded[:2][:, 0]).float()
tokens = (tokens - tokens.mean((0, 2, 3), keepdim=True)) / tokens.std((0, 2, 3), keepdim=True)
counts, mask = torch.tensor(store.counts[:2].astype("int32")), torch.tensor(store.mask[:2])
eta = decoder(tokens)
rate = st.rate(eta, definition.link)
loss = objective(eta, counts, mask)
(gradient,) = torch.autograd.grad(loss, eta)
squared = gradient.square().sum((0, 2, 3))

# %%
step = pd.DataFrame(
    {
        "gene": store.genes,
        "mean count in tissue": counts.movedim(1, 0)[:, mask].float().mean(1),
        "mean rate at the start": rate.detach().movedim(1, 0)[:, mask].mean(1),
        "share of the squared gradient": squared / squared.sum(),
    }
)
tables.show(step.nlargest(5, "share of the squared gradient"))

# %% tags=["remove-input"]
Markdown(
    f"The loss of this step is {loss.item():.4g}; the five genes above have the largest part in it."
)

# %% [markdown]
# ## All runs
#
# Each run draws one cached view of every training patch per epoch, and keeps the epoch with the lowest loss on strips of the training sections that are held out. Runs differ in test patient and seed; how much the seed alone changes shows between curves of one patient.

# %%
results = [runs.load(settings, this) for this in chosen]

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Loss (**a**) and PCC at 8 µm (**b**) on the held-out strips of the training patients, one line per run. Dots are the epochs that were kept."}, "image": {"alt": "Training curves of the arm's runs"}}
figure, (left, right) = style.subplots(1, 2, figsize=(8.2, 2.9))
curves = []
for number, result in enumerate(results):
    log, name = result.log, f"{result.run.test_patient}, seed {result.run.seed}"
    best = log.loc[log["validation_loss"].idxmin()]
    for axis, column in ((left, "validation_loss"), (right, "validation_pcc_8um")):
        (line,) = axis.plot(log["epoch"], log[column], color=f"C{number % 10}", lw=1.2, label=name)
        axis.plot(best["epoch"], best[column], "o", ms=4, color=line.get_color())
    curves.append(log.drop(columns="seconds").assign(run=name))
left.set(xlabel="epoch", ylabel="held-out loss")
right.set(xlabel="epoch", ylabel="PCC at 8 µm, held-out strips")
for axis in (left, right):
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
right.legend(title="test patient", fontsize=7, frameon=False)
style.letter(left, right)
style.mark(figure, settings.source, pd.concat(curves), runs=len(results))

# %% [markdown]
# Scores on the test patients, means over genes, within tissue unless *unmasked* is said. Scores of a run that [collapsed](03_results.ipynb) say nothing.

# %%
columns = [
    "test_patient",
    "seed",
    "collapsed",
    "pcc_2um",
    "pcc_8um",
    "pcc_8um_unmasked",
    "ssim_2um",
    "deviance",
]
columns += ["pcc_8um_rate", "epochs", "seconds"]
every = runs.run_table(settings, results)
table = every[columns].dropna(axis=1, how="all")
tables.show(table.astype({"seconds": int}), missing="undefined")

# %% [markdown]
# Mean over the runs of a patient that did not collapse, and the standard deviation between them:

# %%
alive = every[~every["collapsed"]].groupby("test_patient")["pcc_8um"]
tables.show(
    alive.agg(["size", "mean", "std"]).set_axis(["runs", "PCC 8 µm", "s.d."], axis=1).reset_index()
)

# %% tags=["remove-input"]
what = results[0].provenance
Markdown(
    f"""
| | |
|---|---|
| training patches of the first run | {what["training_patches"]}, of {", ".join(what["training_patients"])} |
| patches that select the epoch | {what["validation_patches"]}, along one side of each of these sections |
| trained parameters | {what["parameters"]:,} |
| hardware | {what["hardware"]} |
"""
)
