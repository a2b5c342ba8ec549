# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The sparsity dial

# %% tags=["remove-cell", "parameters"]
preset = "smoke"
source = ""
cohort = ""

# %% tags=["remove-cell"]
from IPython.display import HTML, display

from sparsity_trap import runs as results
from sparsity_trap.analysis import comparisons
from sparsity_trap.data.sections import open_preset
from sparsity_trap.show import control_figures, interactive, style, tables

settings = open_preset(preset, source, cohort)
table = comparisons.long_table(settings, results.load_all(settings))

# %% [markdown]
# Genes differ in more than sparsity, so an association over genes cannot show a cause. Here the same genes are made sparser: UMIs of the training sections are kept with a probability from 1 down to 1/16, images
# unchanged, and both losses are trained with link exp and bias −3. Every model is scored against the untouched counts of the test patient: its section is never thinned and takes no part in training, so no half of the counts has to be set aside.
#
# :::{when} dial.keep.slope
# Per halving of the counts, the gain of Poisson over MSE in PCC at 8 µm changes by {val}`dial.keep.per_halving:+.4f` on average over genes (95 % interval {val}`dial.keep.per_halving_low:+.4f` to
# {val}`dial.keep.per_halving_high:+.4f`, p = {val}`dial.keep.p_value:.2g`).
# :::
#
# The second dial is the width of the bins that the loss compares: summed to wider bins, the same counts are less sparse. Each model is scored at the width it was trained at.
#
# :::{when} dial.bin_um.slope
# Per doubling of the width, the gain changes by {val}`dial.bin_um.slope:+.4f` ({val}`dial.bin_um.ci_low:+.4f` to {val}`dial.bin_um.ci_high:+.4f`).
# :::

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-dial", "caption": "Gain of Poisson over MSE at matched link and bias against the mean count of the bins that the loss sees, with 95 % intervals over genes. Left: training counts thinned. Right: bins summed."}, "image": {"alt": "Curves of the gain against mean count for thinning and for bin width"}}
titles = {"keep": "training counts thinned", "bin_um": "bins summed"}
dials = {titles[name]: dial for name, dial in comparisons.dials(table).items()}
if dials:
    figure = control_figures.dial_curves(dials, settings.source)
else:
    figure = style.not_trained("the dial")
figure

# %% [markdown]
# :::{when} dial.keep.slope
# Gene by gene; a click opens the gene in the [browser](05b_browser).
# :::

# %% tags=["remove-input"]
plot = HTML("<!-- not trained -->")
if dials:
    categories = table.groupby("gene")["category"].first()
    figure, choices = interactive.dial_browser(dials, categories, settings.source)
    plot = interactive.show(figure, "dial", gene_page="05b_browser.html", choices=choices)
plot

# %% tags=["remove-input"]
for dial in dials.values():
    display(tables.show(dial.curve, digits=4))
