"""Train one run: python workflow/train_run.py arm=A test_patient=P5 seed=0 preset=laptop source= cohort="""

import sys

from sparsity_trap import runs
from sparsity_trap.data.sections import open_preset
from sparsity_trap.settings import Run, UserError

if __name__ == "__main__":
    arguments = dict(pair.split("=", 1) for pair in sys.argv[1:])
    try:
        run = Run(**{key: arguments.pop(key) for key in Run.model_fields})
        runs.run(open_preset(**arguments), run)
    except UserError as error:
        sys.exit(f"error: {error}")
