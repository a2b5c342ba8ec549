"""Write every number that the book quotes: python workflow/quote_numbers.py OUT preset=laptop source="""

import json
import sys
from pathlib import Path

from sparsity_trap import results
from sparsity_trap.config import load_preset
from sparsity_trap.files import building

if __name__ == "__main__":
    arguments = dict(pair.split("=", 1) for pair in sys.argv[2:])
    preset = load_preset(arguments["preset"], arguments["source"] or None)
    numbers = results.numbers(preset, results.load_all(preset))
    with building(Path(sys.argv[1])) as partial:
        partial.write_text(json.dumps(numbers, indent=1))
