"""Kaplan and Meier's curves of patients by predicted risk, with the log-rank test and the numbers at risk."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from histossl.evaluate.outcomes import followed

TICKS = 5  # times, at most, at which the numbers at risk are told
GROUPS = ("lower risk", "higher risk")


def risk_groups(found: pd.DataFrame) -> dict[str, Any]:
    """Part the patients at the middle of the out-of-fold ranks of their risk.

    The middle is that of the patients whom the same models scored, so that no threshold is chosen by the outcomes.

    Args:
        found: predictions of one target and one method: `patient_id`, `truth` as text and `predicted`, the rank.

    Returns:
        `p`: of the log-rank test, nan where one group is empty; `ticks`: (T,) round times; `groups`: for each
        group `name`, `patients`, `events`, `time` and `survival` (the corners of its curve) and `at_risk` (T,).
    """
    from lifelines import KaplanMeierFitter
    from lifelines.statistics import logrank_test

    people = pd.DataFrame(found.groupby("patient_id", sort=True).agg({"truth": "first", "predicted": "mean"}))
    truth = followed(np.asarray(people["truth"], str))
    high = np.asarray(people["predicted"], float) > 0.5
    parts = [truth[~high], truth[high]]
    ticks = _round_times(float(truth[:, 0].max()))
    groups = []
    for name, part in zip(GROUPS, parts, strict=True):
        about: dict[str, Any] = {"name": name, "patients": len(part), "events": int(part[:, 1].sum())}
        if len(part):
            curve = KaplanMeierFitter().fit(part[:, 0], part[:, 1]).survival_function_.iloc[:, 0]
            about |= {"time": curve.index.astype(float).tolist(), "survival": curve.tolist()}
        groups.append(about | {"at_risk": [int((part[:, 0] >= tick).sum()) for tick in ticks]})
    both = all(map(len, parts))
    p = logrank_test(parts[0][:, 0], parts[1][:, 0], parts[0][:, 1], parts[1][:, 1]).p_value if both else float("nan")
    return {"p": float(p), "ticks": ticks.tolist(), "groups": groups}


def _round_times(end: float) -> NDArray[np.float64]:
    """Times from 0 to the end, at equal steps of 1, 2, 3 or 5 tens, ones, tenths, ..."""
    least = end / TICKS
    ten = 10.0 ** np.floor(np.log10(least))
    step = next(k * ten for k in (1, 2, 3, 5, 10) if k * ten > least)
    return np.arange(0, end * (1 + 1e-9), step)


def p_text(p: float) -> str:
    """The p-value of the log-rank test for people.

    Args:
        p: in [0, 1], or nan.

    Returns:
        Text such as "log-rank p = 0.012".
    """
    return "" if p != p else "log-rank p < 0.001" if p < 0.001 else f"log-rank p = {p:.3f}"
