"""Choose variable genes: python workflow/choose_panel.py preset=laptop source= cohort="""

import sys

from sparsity_trap import runs
from sparsity_trap.data.sections import open_preset
from sparsity_trap.settings import UserError

if __name__ == "__main__":
    try:
        runs.panel(open_preset(**dict(pair.split("=", 1) for pair in sys.argv[1:])))
    except UserError as error:
        sys.exit(f"error: {error}")
