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
patient = "P5"

# %% tags=["remove-cell"]
from IPython.display import Markdown

from sparsity_trap import figures, steps
from sparsity_trap.config import load_preset

settings = load_preset(preset, source or None)

# %% tags=["remove-input", "title"]
Markdown(f"# Patient {patient}")

# %% [markdown]
# The section is read from its Space Ranger folder in one streaming pass, and cut into patches of 128 × 128 bins of 2 µm. Each patch's H&E is resampled to
# 224 × 224 pixels through the map from array to image that is fitted to the positions of its own bins.

# %% tags=["hide-input"]
store = steps.store(settings, patient)
tokens = steps.tokens(settings, patient)

# %% tags=["remove-input"]
registration = store.registration
Markdown(
    f"""
| | |
|---|---|
| patches kept | {len(store)} |
| array, in bins | {store.grid_shape[0]} × {store.grid_shape[1]} |
| image scale | {store.microns_per_pixel:.4f} µm per pixel |
| in tissue | {store.mask[:].mean():.0%} of the bins of these patches |
| registration, one map per patch | {registration["patch_rms_px"]:.3f} px r.m.s. |
| registration, one map for the section | {registration["section_max_px"]:.2f} px at most |
"""
)

# %% [markdown]
# ## Section
#
# Counts and image must show the same tissue at the same place.

# %% tags=["hide-input"] mystnb={"figure": {"caption": "The section: H&E, total counts of the panel per 8 µm bin, and both overlaid with the patches that are kept."}, "image": {"alt": "H&E, count map and overlay of one section"}}
figures.section_overview(store)

# %% [markdown]
# ## Patches
#
# What a model sees, and what it is asked to predict. At 2 µm most bins of most genes hold a zero.

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Patches from the section: H&E, tissue mask, and counts at 2 µm of four genes (colour scale from 0 to 3 UMI)."}, "image": {"alt": "Patches with H&E, mask and counts of four genes"}}
figures.patch_gallery(store, ["MT-CO3", "CEACAM5", "COL1A1", "IGKC"])

# %% [markdown]
# ## Stripes
#
# Capture efficiency alternates between neighbouring rows and columns of bins. No image can tell, so this is noise that a model cannot predict; at 8 µm it averages out.

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Mean panel counts of single rows and columns of bins."}, "image": {"alt": "Row and column means with period two"}}
figures.stripes(store)
