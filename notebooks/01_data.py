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
patient = "P5"

# %% tags=["remove-cell"]
from IPython.display import Markdown

from sparsity_trap import runs
from sparsity_trap.data import alignment as registration
from sparsity_trap.data.genes import in_panel
from sparsity_trap.data.sections import open_preset
from sparsity_trap.show import figures

settings = open_preset(preset, source, cohort)

# %% tags=["remove-input", "title"]
Markdown(f"# Patient {patient}")

# %% [markdown]
# The section is read from its Space Ranger folder in one streaming pass, and cut into patches of 128 × 128 bins of 2 µm. Each patch's H&E is resampled to
# 224 × 224 pixels through the map from array to image that is fitted to the positions of its own bins.

# %% tags=["hide-input"]
store = runs.store(settings, patient)
tokens = runs.tokens(settings, patient)
shift = registration.count_image_shift(store.images, store.counts)

# %% tags=["remove-input"]
fit = store.registration
Markdown(
    f"""
| | |
|---|---|
| patches kept | {len(store)} |
| array, in bins | {store.grid_shape[0]} × {store.grid_shape[1]} |
| image scale | {store.microns_per_pixel:.4f} µm per pixel |
| in tissue | {store.mask[:].mean():.0%} of the bins of these patches |
| registration, one map per patch | {fit["patch_rms_px"]:.3f} px r.m.s. |
| registration, one map for the section | {fit["section_max_px"]:.2f} px at most |
| counts against image | {shift.rows:+.1f} rows, {shift.columns:+.1f} columns of bins |
"""
)

# %% [markdown]
# ## Section
#
# Counts and image must show the same tissue at the same place.

# %% tags=["hide-input"] mystnb={"figure": {"caption": "The section: H&E, total counts of the panel per 8 µm bin, and both overlaid with the patches that are kept."}, "image": {"alt": "H&E, count map and overlay of one section"}}
figures.section_overview(store)

# %% tags=["remove-input"]
Markdown(
    f"**Warning:** {shift.warning}."
    if shift.warning
    else "Counts and image show no shift against each other."
)

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Registration. Contours enclose bins with many counts; they must follow dark tissue. Right: mean over patches of the correlation of optical density with counts at every offset; the cross marks its peak, which should lie at zero."}, "image": {"alt": "Close-up of H&E with count contours, and a correlation map"}}
figures.registration_check(store, shift)

# %% [markdown]
# ## Patches
#
# What a model sees, and what it is asked to predict. At 2 µm most bins of most genes hold a zero.

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Patches from the section: H&E, tissue mask, and counts at 2 µm of four genes (colour scale from 0 to 3 UMI)."}, "image": {"alt": "Patches with H&E, mask and counts of four genes"}}
figures.patch_gallery(store, in_panel(["MT-CO3", "CEACAM5", "COL1A1", "IGKC"], store.genes))

# %% [markdown]
# ## Stripes
#
# Capture efficiency alternates between neighbouring rows and columns of bins. No image can tell, so a model cannot predict it; at 8 µm most of it averages out. The factors are estimated from the
# counts of all genes against the lines around. Counts are never edited.

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Counts of single rows and columns of bins relative to the lines around them."}, "image": {"alt": "Row and column means with period two"}}
figures.stripes(store)
