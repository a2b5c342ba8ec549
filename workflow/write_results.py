"""Write every number that the book quotes, tables S1 to S3 and the claims ledger:

python workflow/write_results.py results/laptop preset=laptop source= cohort=
"""

import json
import sys
from pathlib import Path

from sparsity_trap import runs as results
from sparsity_trap.analysis import claims, comparisons
from sparsity_trap.data.sections import open_preset
from sparsity_trap.files import building
from sparsity_trap.settings import UserError


def main() -> None:
    folder = Path(sys.argv[1])
    arguments = dict(pair.split("=", 1) for pair in sys.argv[2:])
    preset = open_preset(**arguments)
    runs = results.load_all(preset)
    numbers = results.numbers(preset, runs) | comparisons.numbers(preset, runs)
    ledger = claims.ledger(comparisons.evidence(preset, runs))
    verdicts = ledger["verdict"].value_counts()
    for verdict in ("supported", "not supported", "undetermined"):
        numbers[f"claims.{verdict.replace(' ', '_')}"] = int(verdicts.get(verdict, 0))
    with building(folder / "tables") as partial:
        partial.mkdir()
        for name, table in results.supplementary_tables(preset).items():
            table.to_csv(partial / f"{name}.csv", index=False)
        ledger.to_csv(partial / "claims.csv", index=False)
    with building(folder / "numbers.json") as partial:
        partial.write_text(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
