"""Curves of training, which the pages of the arms and of the results draw."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.ticker import MaxNLocator

from sparsity_trap.show.style import Exhibit, arm_style, letter, mark, subplots


def training_dynamics(logs: Mapping[str, pd.DataFrame], source: str) -> Exhibit:
    """Loss and PCC at 8 µm on the held-out blocks of the training patients, by epoch.

    Losses of different arms have different units, and some are negative, so each is shown as the
    share of its fall, from the first epoch to the lowest value, that is still to come.

    Parameters
    ----------
    logs
        Arm, or what else tells the runs apart -> one row per epoch: ``epoch``,
        ``validation_loss``, ``validation_pcc_8um``, ``seconds``.
    source
        Kind of data, for the mark.
    """
    figure, axes = subplots(1, 2, figsize=(9.4, 3))
    for name, log in logs.items():
        colour, line = arm_style(name)
        loss = log["validation_loss"]
        best, fall = loss.idxmin(), loss.iloc[0] - loss.min()
        left = (loss - loss.min()) / fall if fall > 0 else loss - loss.min()
        for axis, values in zip(axes, (left, log["validation_pcc_8um"]), strict=True):
            axis.plot(log["epoch"], values, line, color=colour, lw=1.4, label=name)
            axis.plot(log["epoch"][best], values[best], "o", color=colour, ms=4.5)
    axes[0].set_ylabel("held-out loss,\nfirst epoch 1, lowest 0")
    axes[1].set_ylabel("held-out PCC at 8 µm,\nmean over genes")
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    letter(*axes)
    axes[1].legend(
        title="arm (dot: epoch kept)", fontsize=7.5, title_fontsize=7.5,
        loc="center left", bbox_to_anchor=(1, 0.5),
    )  # fmt: skip
    drawn = pd.concat(log.assign(arm=name) for name, log in logs.items())
    return mark(figure, source, drawn.drop(columns="seconds"))  # which no two runs share
