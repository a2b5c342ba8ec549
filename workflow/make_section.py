"""Simulate one patient's Space Ranger folder:

python workflow/make_section.py P5 preset=laptop source= cohort=
"""

import sys

from sparsity_trap import runs
from sparsity_trap.data.sections import open_preset
from sparsity_trap.settings import UserError

if __name__ == "__main__":
    arguments = dict(pair.split("=", 1) for pair in sys.argv[2:])
    try:
        preset = open_preset(**arguments)
        runs.section(preset, sys.argv[1])
    except UserError as error:
        sys.exit(f"error: {error}")
