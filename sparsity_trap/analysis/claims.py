"""The claims ledger: each claim of the paper, the rule it is judged by, and the verdict.

Sentences and rules stand in ``notebooks/10_claims.py``, each above the cell that computes its
evidence, so that they are in the repository before any result is; a `Ledger` reads them there. What
turns an interval into a verdict is `verdict`, and nothing else unless a rule says so.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import pandas as pd

from sparsity_trap.settings import ROOT, UserError

Verdict = Literal["supported", "not supported", "undetermined"]
Source = Literal["this project", "published"]

#: Least difference of a PCC or SSIM worth the name.
WORTH = 0.02

#: Least rank correlation worth the name.
WORTH_RHO = 0.1

#: A correlation this near to 0 counts as null.
NULL_PCC = 0.05

NOTEBOOK = ROOT / "notebooks" / "10_claims.py"

#: A claim in the notebook's source: label, heading with the sentence, paragraph with the rule.
_CLAIM = re.compile(r"^# \(claim-(\w+)\)=\n# ### (.+)\n#\n# \*Rule\.\* (.+)$", re.MULTILINE)


def verdict(low: float, high: float, above: float = 0.0, below: float = WORTH) -> Verdict:
    """What an interval says of a claim that an effect is larger than ``above``.

    Parameters
    ----------
    low, high
        Ends of the interval; NaN where there is no evidence.
    above
        The claim is supported where the whole interval lies over it.
    below
        Least effect worth the name: not supported where the whole interval lies under it.
    """
    if low > above:
        return "supported"
    return "not supported" if high < below else "undetermined"


class Estimate(NamedTuple):
    """A statistic with its 95 % interval and the number of units, genes unless it says otherwise.

    NaN where there is none; without arguments it stands for evidence that was not computed.
    """

    value: float = np.nan
    low: float = np.nan
    high: float = np.nan
    n: int = 0


class Claim(NamedTuple):
    """A row of the ledger; a notebook shows it as its verdict and statistic.

    Attributes
    ----------
    key, text, rule
        Short name, the claim and its decision rule in a sentence each.
    source
        Whose numbers it is judged on.
    verdict
        What they say.
    statistic, value, ci_low, ci_high, n
        Name of the statistic, and its `Estimate`.
    """

    key: str
    text: str
    rule: str
    source: Source
    verdict: Verdict
    statistic: str
    value: float
    ci_low: float
    ci_high: float
    n: int

    @property
    def found(self) -> str:
        """The statistic in words; a dash where there is none."""
        if not np.isfinite(self.value):
            return "–"
        numbers = f"{self.value:.3g}"
        if np.isfinite(self.ci_low):
            numbers += f" ({self.ci_low:.3g} to {self.ci_high:.3g})"
        numbers = numbers.replace("-", "\N{MINUS SIGN}")
        return f"{self.statistic}: {numbers}, n = {self.n}"

    def _repr_markdown_(self) -> str:
        reason = self.found if np.isfinite(self.value) else "no evidence in this run"
        return f"**{self.verdict}** · {reason}"


def read_claims(notebook: Path = NOTEBOOK) -> dict[str, tuple[str, str]]:
    """Key -> sentence and rule of every claim in the notebook's source, in its order.

    Raises
    ------
    UserError
        A key stands there twice.
    """
    found = _CLAIM.findall(notebook.read_text(encoding="utf8"))
    keys = [key for key, *_ in found]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"{notebook}: claim '{key}' stands there twice: give each its own key")
    return {key: (text, rule) for key, text, rule in found}


class Ledger:
    """The verdicts of a notebook, in the order in which its claims stand there.

    Parameters
    ----------
    notebook
        Script with the sentences and rules.
    """

    def __init__(self, notebook: Path = NOTEBOOK) -> None:
        self.notebook = notebook
        self.listed = read_claims(notebook)
        self.claims: dict[str, Claim] = {}

    def judge(
        self,
        key: str,
        statistic: str,
        estimate: Estimate,
        ruling: Verdict | None = None,
        *,
        above: float = 0.0,
        below: float = WORTH,
        source: Source = "this project",
    ) -> Claim:
        """Enter a claim; a later judgement of the same key takes the place of an earlier one.

        Parameters
        ----------
        key
            Of a claim in the notebook.
        statistic
            Name of what was estimated.
        estimate
            The evidence.
        ruling
            Verdict by the claim's own rule; without one, that of `verdict` with ``above`` and
            ``below``.
        source
            Whose numbers the estimate was made from.

        Raises
        ------
        UserError
            The notebook has no such claim.
        """
        if key not in self.listed:
            choices = ", ".join(self.listed)
            raise UserError(f"claim '{key}' is not in {self.notebook.name}: choose from {choices}")
        if ruling is None:
            ruling = verdict(estimate.low, estimate.high, above, below)
        text, rule = self.listed[key]
        value, low, high, n = estimate
        claim = Claim(key, text, rule, source, ruling, statistic, value, low, high, n)
        self.claims[key] = claim
        return claim

    def table(self) -> pd.DataFrame:
        """One row per claim, columns as the attributes of `Claim`.

        Raises
        ------
        UserError
            A claim of the notebook was not judged.
        """
        missing = [key for key in self.listed if key not in self.claims]
        if missing:
            raise UserError(
                f"claims without a verdict in {self.notebook.name}: {', '.join(missing)}: "
                "judge each in a cell below its rule"
            )
        return pd.DataFrame([self.claims[key] for key in self.listed], columns=Claim._fields)

    def counts(self) -> dict[str, int]:
        """Number of claims of each verdict, 0 included, by its name with underscores."""
        verdicts = [claim.verdict for claim in self.claims.values()]
        return {name.replace(" ", "_"): verdicts.count(name) for name in get_args(Verdict)}
