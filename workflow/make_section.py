"""Simulate one patient's Space Ranger folder: python workflow/make_section.py P5 preset=laptop source="""

import sys

from sparsity_trap import steps
from sparsity_trap.config import UserError, load_preset

if __name__ == "__main__":
    arguments = dict(pair.split("=", 1) for pair in sys.argv[2:])
    try:
        preset = load_preset(arguments["preset"], arguments["source"] or None)
        steps.section(preset, sys.argv[1])
    except UserError as error:
        sys.exit(f"error: {error}")
