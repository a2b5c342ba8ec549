"""The ledger as the front page shows it: each claim's effect drawn, its rule folded below."""

from __future__ import annotations

import html
import re
from pathlib import Path

import numpy as np

from sparsity_trap.analysis.claims import WORTH, Claim, read_ledgers
from sparsity_trap.analysis.families import FAMILIES

#: Claims on this build that the front page shows first, with all those on real counts.
FIRST = (
    "rescue", "rescue_matched", "rescue_best_rate", "rescue_linear", "share_of_loss",
    "between_genes", "sparsity_causes_gain", "collapse", "deep_beats_linear",
)  # fmt: skip

#: Ends of the axis and its ticks, in multiples of the least effect worth the name.
ENDS = -10.0, 30.0
TICKS = {-10: "−10", -1: "−1", 0: "0", 1: "1", 10: "10"}


def place(multiple: float) -> float:
    """Per cent of the axis that lie left of a multiple, clipped to its ends.

    The axis is linear near 0 and logarithmic far from it (inverse hyperbolic sine), so that a
    small effect and a huge one can stand in one picture.
    """
    low, high, at = np.arcsinh([*ENDS, np.clip(multiple, *ENDS)])
    return round(100 * float((at - low) / (high - low)), 2)


def drawn(claim: Claim) -> str:
    """A claim's estimate and interval on the axis; empty where its rule is of another kind.

    Zero is what the statistic must exceed. The shaded zone ends at its least value worth the name.
    """
    if not np.isfinite([claim.value, claim.ci_low, claim.ci_high, claim.above]).all():
        return ""
    unit = claim.below - claim.above or WORTH
    at = [place((x - claim.above) / unit) for x in (claim.value, claim.ci_low, claim.ci_high)]
    worth = place((claim.below - claim.above) / unit)
    return (
        f'<span class="zone" style="width:{worth}%"></span>'
        f'<span class="zero" style="left:{place(0)}%"></span>'
        f'<span class="interval" style="left:{at[1]}%;width:{at[2] - at[1]:.2f}%"></span>'
        f'<span class="point" style="left:{at[0]}%"></span>'
    )


def row(claim: Claim) -> str:
    """A claim: what it says, the picture and the verdict; rule and evidence fold out."""
    says = re.split(r":(?![^(]*\))", claim.text)[0].rstrip(".")  # to a colon, not one in brackets
    short = html.escape(says, quote=False)
    kind = claim.verdict.replace(" ", "-")
    return "\n".join(
        [
            f'<details class="claim {kind}">',
            f'<summary><span class="says">{short}</span>'
            f'<span class="axis">{drawn(claim)}</span>'
            f'<span class="verdict">{claim.verdict}</span></summary>',
            "",
            f"{claim.text} {claim.rule}",
            "",
            f"{claim.found[:1].upper()}{claim.found[1:]}. [The evidence](claim-{claim.key})",
            "",
            "</details>",
        ]
    )


def claims(folder: Path, first: bool) -> str:
    """The ledgers in a folder, by family: a picture with a row for each claim that comes first."""
    ticks = "".join(
        f'<span style="left:{place(tick)}%">{text}</span>' for tick, text in TICKS.items()
    )
    parts = []
    for family, ledger in read_ledgers(folder).items():
        found = [Claim(**row) for row in ledger.to_dict("records")]
        rows = [row(c) for c in found if first == (family == "real" or c.key in FIRST)]
        if rows:
            parts += [
                '<div class="claims">',
                f'<p class="family"><span class="says">Judged on {FAMILIES[family].title}</span>'
                f'<span class="axis" aria-hidden="true">{ticks}</span><span></span></p>',
                *rows,
                "</div>",
                "",
            ]
    return "\n".join(parts)
