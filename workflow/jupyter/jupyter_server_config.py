"""Settings of `make edit`."""

import json
from functools import partial

from jupytext import cell_metadata

# jupytext escapes what is not ASCII in the metadata of cells: saved, a caption with µ would change.
cell_metadata.dumps = partial(json.dumps, ensure_ascii=False)
