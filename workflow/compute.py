"""Compute a patient's simulated section, its patch store and tokens, or the runs of an arm:

python workflow/compute.py section P5 preset=laptop source= cohort=
python workflow/compute.py tokens P5 preset=laptop source= cohort=
python workflow/compute.py arm E preset=laptop source= cohort=
"""

import sys

from execute_notebook import own_card

from sparsity_trap import runs
from sparsity_trap.data.sections import open_preset
from sparsity_trap.settings import UserError

if __name__ == "__main__":
    what, name, *given = sys.argv[1:]
    try:
        preset = open_preset(**dict(pair.split("=", 1) for pair in given))
        if what == "section":
            runs.section(preset, name)
        else:
            with own_card():
                if what == "tokens":
                    runs.tokens(preset, name)
                else:
                    for this in runs.of_arm(preset, name):
                        runs.run(preset, this)
    except UserError as error:
        sys.exit(f"error: {error}")
