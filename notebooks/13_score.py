# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Score your own model
#
# Is a model better than nothing, how far is it from the ceiling, where does it fail, and why do its numbers differ from those of a paper? One call answers for any maps of predicted counts. It needs `pip install .` and no more:
#
# ```python
# import sparsity_trap as st
#
# # maps [N, G, H, W], or batches of these
# found = st.evaluate(counts, rate, mask, train_mean, genes)
# print(*found.findings, *found.verdict, sep="\n")
# found.to_dataframe()  # every score of every map and gene
# found.report("card")  # the report card, with the book's own packages
# ```
#
# Files go through `make score`, with AnnData, SpatialData, zarr or npz on one side, Space Ranger's output or a patch store on the other ([](../reuse.md)). This page runs the call on arms of this build and on a map that was turned upside down.

# %% tags=["remove-cell", "parameters"]
preset = "smoke"
source = ""
cohort = ""

# %%
import numpy as np
import pandas as pd
import torch
from IPython.display import HTML, Markdown
from torch.nn.functional import interpolate

import sparsity_trap as st
from sparsity_trap import runs
from sparsity_trap.bins import bin_sum
from sparsity_trap.evaluation.protocols import PROTOCOLS
from sparsity_trap.evaluation.verdict import beaten_under, blind_nulls
from sparsity_trap.score import compare
from sparsity_trap.settings import MARKS, SOURCE_NAMES
from sparsity_trap.show import style, tables
from sparsity_trap.training import training_mean

style.use()
settings = runs.open_preset(preset, source, cohort)
quote = runs.Quotes(settings, "13_score")
mse, poisson = runs.contrast(settings)  # arms D and E on the main patient
store = runs.store(settings, settings.main_patient)
mean = training_mean(settings, poisson.run)

# %% [markdown]
# ## Maps
#
# Arms D and E, arm E with the rows of each patch in reverse, and arm B where the preset trains it or arm A: B is A, summed to 8 µm and interpolated back.


# %%
def interpolated(rate):
    """Rates [G, 128, 128] summed to 8 µm and brought back by cubic interpolation."""
    density = torch.from_numpy(bin_sum(np.asarray(rate, np.float32), 4) / 16)[:, None]
    return interpolate(density, scale_factor=4, mode="bicubic")[:, 0].clamp(min=0).numpy()


home = [r for r in settings.all_runs() if r.test_patient == settings.main_patient]
models = {"arm D": (mse.predictions, np.asarray), "arm E": (poisson.predictions, np.asarray)}
for arm, change in (("A", interpolated), ("B", np.asarray)):
    if own := [r for r in home if r.arm == arm]:
        models["arm B"] = runs.load(settings, own[0]).predictions, change
models["arm E, flipped"] = poisson.predictions, lambda rate: np.asarray(rate)[:, ::-1]


# %%
def evaluated(name):
    """A model's patches, one after the other, scored in one pass."""
    predictions, change = models[name]
    batches = (
        [x[None] for x in (store.counts[i], change(predictions[i]), store.mask[i])]
        + ([store.truth[i][None]] if store.truth is not None else [])
        for i in range(len(store))
    )
    return st.evaluate(batches, train_mean=mean, genes=store.genes, name=name)


found = {name: evaluated(name) for name in models}

# %% [markdown]
# ## Verdict
#
# Of arm E, as the report card gives it:

# %% tags=["hide-input"]
Markdown("\n".join(f"* {sentence}" for sentence in found["arm E"].verdict))

# %% [markdown]
# Each model beside the nulls that see nothing of the counts, those that know part of the answer, and the ceiling. *Patch mean* knows each gene's mean in the patch, *depth only* the total of the other genes in the bin: what most genes share, where the tissue is dense or was caught well.

# %%
rows = {}
for name, one in found.items():
    pcc = {of: np.nanmean(own["pcc_8um"]) if not np.isnan(own["pcc_8um"]).all() else np.nan
           for of, own in one.scores.items()}  # fmt: skip
    rows[name] = {
        "PCC 8 µm": pcc["model"],
        "best null": np.nanmax([pcc[of] for of in blind_nulls(pcc)]),
        "patch mean": pcc["patch mean"],
        "depth only": pcc["depth only"],
        "ceiling": np.nanmean(one.ceilings["ceiling_8um"]),
    }
beside = pd.DataFrame(rows).T
beside["share of ceiling"] = beside["PCC 8 µm"] / beside["ceiling"]
quote(
    "score", share=beside.loc["arm E", "share of ceiling"], depth=beside.loc["arm E", "depth only"]
)
quote("score", pcc=beside.loc["arm E", "PCC 8 µm"], nothing=beside.loc["arm E", "best null"])
tables.show(beside, index=True, missing="undefined")

# %% [markdown]
# Arm E has a PCC of {val}`score.pcc:.3f` at 8 µm, {val}`score.share:.0%` of its ceiling; the best null that sees nothing has {val}`score.nothing:.3f`, the depth of the other genes alone {val}`score.depth:.3f`.
#
# ## As published elsewhere
#
# The same maps under protocols of the literature ([](protocols)). Nulls are those of arm E.

# %%
numbers = {name: one.protocols["model"] for name, one in found.items()}
others = found["arm E"].protocols
blind = {of: own for of, own in others.items() if of in blind_nulls(others)}
numbers["best null"] = pd.DataFrame(blind).max(axis=1)
numbers |= {of: others[of] for of in ("patch mean", "depth only", "oracle") if of in others}
by_protocol = pd.DataFrame(numbers)
beaten = {name: beaten_under(one.protocols) for name, one in found.items()}
lost = {
    name: [p for p, nulls in own.items() if set(nulls) & set(blind)] for name, own in beaten.items()
}
by_protocol["a null beats"] = [
    "; ".join(name.removeprefix("arm ") for name in found if protocol in lost[name]) or "–"
    for protocol in by_protocol.index
]
quote("score", protocols=len(by_protocol), lost=len(lost["arm E"]))
tables.show(by_protocol.rename({k: p.title for k, p in PROTOCOLS.items()}), index=True,
            missing="undefined")  # fmt: skip

# %% [markdown]
# Under {val}`score.lost` of {val}`score.protocols` protocols a null that sees nothing scores as high as arm E.

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-protocols", "caption": "The same maps under every protocol: models (filled), the best null that sees nothing (cross), and the two that know part of the answer (open). A protocol tells models from nulls where the filled points lie to the right of the cross."}, "image": {"alt": "Scores of models and nulls, one row per protocol"}}
figure, axis = style.subplots(figsize=(6.6, 0.9 + 0.3 * len(by_protocol)))
places = np.arange(len(by_protocol))[::-1]
axis.hlines(places, *axis.get_xlim(), color="#EEEEEE", lw=0.8, zorder=0)
looks = {"arm B": "#56B4E9", "arm D": style.MSE_COLOUR, "arm E": style.POISSON_COLOUR,
         "arm E, flipped": "#BBBBBB"}  # fmt: skip
for name in found:
    axis.scatter(by_protocol[name], places, s=24, color=looks[name], label=name, zorder=3)
axis.scatter(by_protocol["best null"], places, s=34, marker="x", color="black", label="best null")
for name, marker in (("patch mean", "s"), ("depth only", "D")):
    axis.scatter(
        by_protocol[name], places, s=20, marker=marker, fc="none", ec="#777777", label=name
    )
axis.set_yticks(places, [PROTOCOLS[name].title for name in by_protocol.index])
axis.set_xlabel("score")
axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
drawn = by_protocol.drop(columns="a null beats")
drawn = drawn.rename_axis("protocol").reset_index()
style.mark(figure, settings.source, drawn, genes=len(store.genes), patches=len(store))

# %% [markdown]
# ## What looks like a mistake
#
# Flips, transpositions, shifts by whole bins and wrong widths of bins raise no error and cost the score. They are looked for: maps are compared under the eight turns of the square and under shifts of up to 8 bins, and one is named when what each half of the patches finds holds in the other. So are constant maps, and totals that are far from the observed.

# %%
said = {name: one.findings or ["nothing"] for name, one in found.items()}
quote("score", flip=any("flipped top to bottom" in s for s in said["arm E, flipped"]))
Markdown("\n".join(f"* {name}: {' '.join(sentences)}" for name, sentences in said.items()))

# %% [markdown]
# ## Two models
#
# E minus D on the same bins, gene by gene, with intervals over patches: each patch is left out in turn, in both alike. The means have intervals over genes and patches. One run of each arm is compared here, and no interval holds what another training would have changed; [](03_results.ipynb) compares runs.

# %%
pair = {name: found[name] for name in ("arm D", "arm E")}
mean_gain = compare.summary(pair)
quote("score.gain", value=mean_gain["difference"][0], low=mean_gain["ci_low"][0])
quote("score.gain", high=mean_gain["ci_high"][0], wins=mean_gain["n_wins"][0])
tables.show(mean_gain, missing="undefined")

# %% tags=["output_scroll"]
by_gene = compare.differences(found["arm D"], found["arm E"])
tables.show(by_gene, missing="undefined", sortable=True)

# %% [markdown]
# ## The report card
#
# All of this on one page, without a network and fit for paper, with CSV and JSON beside it:

# %%
mark = SOURCE_NAMES[settings.source] if settings.source in MARKS else ""
card = found["arm E"].report(
    settings.folder / "score", picture=lambda patch: np.asarray(store.images[patch]), mark=mark
)

# %% tags=["remove-input"]
HTML('<p><a href="score/index.html">The report card of arm E</a></p>')
