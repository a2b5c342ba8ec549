"""The claims ledger: each claim of the paper, the rule it is judged by, and the verdict.

Sentences and rules stand in a notebook, each above the cell that computes its evidence, so that
they are in the repository before any result is; a `Ledger` reads them there. Claims judged on one
kind of evidence are a family, with a notebook of its own; `families.FAMILIES` lists them.

A claim that an effect is larger than a bound has two hypotheses against it: that the effect is no
larger, and, for *not supported*, that it is worth the name. Only one of them can be true, so a
claim spends one test, and Holm's procedure over the claims of a family (Holm 1979; with Shaffer's
remark of 1986 on hypotheses that exclude each other) keeps the chance of any wrong verdict in it
below 5 %.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
import pandas as pd
from IPython.display import display, update_display
from statsmodels.stats.multitest import multipletests

from sparsity_trap.analysis.families import FAMILIES
from sparsity_trap.settings import UserError

Verdict = Literal["supported", "not supported", "undetermined"]

#: Least difference of a PCC or SSIM worth the name.
WORTH = 0.02

#: Least rank correlation worth the name.
WORTH_RHO = 0.1

#: A correlation this near to 0 counts as null.
NULL_PCC = 0.05

#: One side of 5 %.
LEVEL = 0.025

#: A claim in the notebook's source: label, heading with the sentence, paragraph with the rule.
_CLAIM = re.compile(r"^# \(claim-(\w+)\)=\n# ### (.+)\n#\n# \*Rule\.\* (.+)$", re.MULTILINE)


class Evidence(Protocol):
    """An estimate, its 95 % interval and the number of runs; `effects.Effect` is one."""

    @property
    def value(self) -> float: ...
    @property
    def n(self) -> int: ...
    @property
    def interval(self) -> tuple[float, float]: ...


class Testable(Evidence, Protocol):
    """Evidence that a bound can be tested on, each test one-sided."""

    def p_above(self, bound: float) -> float: ...
    def p_below(self, bound: float) -> float: ...


class Estimate(NamedTuple):
    """A number with an interval, for claims with a rule of their own.

    NaN where there is none; without arguments it stands for evidence that was not computed.
    """

    value: float = np.nan
    low: float = np.nan
    high: float = np.nan
    n: int = 0

    @property
    def interval(self) -> tuple[float, float]:
        """Its ends."""
        return self.low, self.high


class Least(NamedTuple):
    """The smallest of several effects, for claims that all of them exceed a bound.

    Every one must pass its test (an intersection–union test, so the largest p counts); that one of
    them fails is tested at p times their number.
    """

    effects: Sequence[Testable]

    @property
    def smallest(self) -> Testable:
        """That with the least value."""
        return min(self.effects, key=lambda effect: effect.value)

    @property
    def value(self) -> float:
        """Its value."""
        values = [effect.value for effect in self.effects]
        return float(np.min(values)) if values else np.nan

    @property
    def n(self) -> int:
        """Runs behind the effect that has fewest."""
        return min(effect.n for effect in self.effects)

    @property
    def interval(self) -> tuple[float, float]:
        """Interval of the smallest."""
        return self.smallest.interval

    def p_above(self, bound: float) -> float:
        """Largest p: that not all exceed the bound."""
        return float(np.max([effect.p_above(bound) for effect in self.effects]))

    def p_below(self, bound: float) -> float:
        """That none lies below the bound."""
        ps = [effect.p_below(bound) for effect in self.effects]
        return min(1.0, len(ps) * float(np.min(ps)))


class Claim(NamedTuple):
    """A row of the ledger; a notebook shows it as its verdict and statistic.

    Attributes
    ----------
    key, text, rule
        Short name, the claim and its decision rule in a sentence each.
    family
        Of `families.FAMILIES`: what it is judged on.
    verdict
        What that says.
    statistic, value, ci_low, ci_high, n, unit
        Name of the statistic, its value and 95 % interval, and how many of what it is of.
    above, below
        What the statistic must exceed, and its least value worth the name; NaN as for ``p``.
    p
        Of the test that decides, after Holm; NaN for a claim with a rule of its own.
    """

    key: str
    text: str
    rule: str
    family: str
    verdict: Verdict
    statistic: str
    value: float
    ci_low: float
    ci_high: float
    n: int
    unit: str
    above: float = np.nan
    below: float = np.nan
    p: float = np.nan

    @property
    def found(self) -> str:
        """The statistic in words; a dash where there is none."""
        if not np.isfinite(self.value):
            return "–"
        numbers = f"{self.value:.3g}"
        if np.isfinite(self.ci_low):
            numbers += f" ({self.ci_low:.3g} to {self.ci_high:.3g})"
        numbers = numbers.replace("-", "\N{MINUS SIGN}")
        tested = f", p = {self.p:.2g}" if np.isfinite(self.p) else ""
        unit = self.unit.removesuffix("s") if self.n == 1 else self.unit
        return f"{self.statistic}: {numbers}, {self.n} {unit}{tested}"

    def _repr_markdown_(self) -> str:
        reason = self.found if np.isfinite(self.value) else "no evidence in this run"
        return f"**{self.verdict}** · {reason}"


def read_claims(notebook: Path) -> dict[str, tuple[str, str]]:
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
    """The verdicts of a family, in the order in which its claims stand in the notebook.

    Parameters
    ----------
    family
        Of `families.FAMILIES`.
    notebook
        Script with the sentences and rules; the family's own by default.

    Raises
    ------
    UserError
        There is no such family.
    """

    def __init__(self, family: str, notebook: Path | None = None) -> None:
        if family not in FAMILIES:
            choices = ", ".join(FAMILIES)
            raise UserError(f"family '{family}' of claims does not exist: choose from {choices}")
        self.family = family
        self.notebook = notebook or FAMILIES[family].script
        self.listed = read_claims(self.notebook)
        self.claims: dict[str, Claim] = {}
        #: Of each claim that waits for `settle`: the verdict that its test would bear, and p.
        self.tests: dict[str, tuple[Verdict, float]] = {}
        #: What those tests are of: evidence, and the bounds of `judge`.
        self.tested: dict[str, tuple[Any, float, float]] = {}

    def judge(
        self,
        key: str,
        statistic: str,
        evidence: Evidence | Testable,
        ruling: Verdict | None = None,
        *,
        above: float = 0.0,
        below: float = WORTH,
        unit: str = "runs",
    ) -> None:
        """Enter a claim, and show it; a later judgement of its key takes the place of an earlier.

        Parameters
        ----------
        key
            Of a claim in the notebook.
        statistic
            Name of what was estimated.
        evidence
            The estimate.
        ruling
            Verdict by the claim's own rule. Without one it is settled with all others: *supported*
            where the effect is above ``above`` and at least ``below``, *not supported* where it is
            below ``below``; see `settle`.
        above, below
            Bounds of the effect: what it must exceed, and the least worth the name.
        unit
            What the estimate is of.

        Raises
        ------
        UserError
            The notebook has no such claim.
        """
        if key not in self.listed:
            choices = ", ".join(self.listed)
            raise UserError(f"claim '{key}' is not in {self.notebook.name}: choose from {choices}")
        self.tests.pop(key, None)
        bounds = np.nan, np.nan
        if ruling is None:
            ruling, bounds = "undetermined", (above, below)
            test = _test(evidence, above, below)
            if test:
                self.tests[key] = test
                self.tested[key] = evidence, above, below
        text, rule = self.listed[key]
        (low, high), value, n = evidence.interval, evidence.value, evidence.n
        self.claims[key] = Claim(
            key, text, rule, self.family, ruling, statistic, value, low, high, n, unit, *bounds
        )
        display(self.claims[key], display_id=f"claim-{key}")

    def settle(self, folder: Path | None = None) -> pd.DataFrame:
        """Decide the claims that were entered without a verdict, by Holm's procedure.

        Parameters
        ----------
        folder
            Where the table is written, if anywhere, for `read_ledgers`.

        Returns
        -------
        One row per claim, columns as the attributes of `Claim`. What was shown of a claim is
        brought up to date.

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
        if self.tests:
            adjusted = multipletests([p for _, p in self.tests.values()], method="holm")[1]
            for (key, (ruling, _)), p in zip(self.tests.items(), adjusted, strict=True):
                decided = ruling if p <= LEVEL else "undetermined"
                self.claims[key] = self.claims[key]._replace(verdict=decided, p=float(p))
                update_display(self.claims[key], display_id=f"claim-{key}")
        table = pd.DataFrame([self.claims[key] for key in self.listed], columns=Claim._fields)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            table.to_csv(_file(folder, self.family), index=False)
        return table

    def counts(self) -> dict[str, int]:
        """Number of claims of each verdict, 0 included, by its name with underscores."""
        verdicts = [claim.verdict for claim in self.claims.values()]
        return {name.replace(" ", "_"): verdicts.count(name) for name in get_args(Verdict)}


def read_ledgers(folder: Path) -> dict[str, pd.DataFrame]:
    """Tables of all families, as `Ledger.settle` wrote them; without rows where it has not."""
    tables = {}
    for family in FAMILIES:
        path = _file(folder, family)
        known = path.is_file()
        words = {"keep_default_na": False, "na_values": [""], "float_precision": "round_trip"}
        tables[family] = (
            pd.read_csv(path, **words) if known else pd.DataFrame(columns=Claim._fields)
        )
    return tables


def _file(folder: Path, family: str) -> Path:
    return folder / f"claims_{family}.csv"


def _test(evidence: Any, above: float, below: float) -> tuple[Verdict, float] | None:
    """The verdict that lies nearer, and its one-sided p; None where there is no interval."""
    if not hasattr(evidence, "p_above") or not np.isfinite(evidence.interval).all():
        return None
    if evidence.value >= max(above, below):
        return "supported", evidence.p_above(above)
    return "not supported", evidence.p_below(below)
