"""Compute one patient's simulated section, or patch store and tokens:

python workflow/compute.py section P5 preset=laptop source= cohort=
python workflow/compute.py tokens P5 preset=laptop source= cohort=
"""

import sys

from execute_notebook import own_card

from sparsity_trap import runs
from sparsity_trap.data.sections import open_preset
from sparsity_trap.settings import UserError

if __name__ == "__main__":
    what, patient, *given = sys.argv[1:]
    try:
        preset = open_preset(**dict(pair.split("=", 1) for pair in given))
        if what == "section":
            runs.section(preset, patient)
        else:
            with own_card():
                runs.tokens(preset, patient)
    except UserError as error:
        sys.exit(f"error: {error}")
