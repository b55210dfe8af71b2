"""Summaries of a probe: a few lines, or one small table."""

from __future__ import annotations

import pandas as pd

SCORES = (("auroc", "AUROC"), ("spearman", "Spearman"), ("c_index", "C-index"))
_LINES = 6  # targets that are listed


def told(*tables: pd.DataFrame) -> str:
    """Summarise a probe: the first method's score with all labels, beside the best of the others.

    Args:
        tables: `table`, `numbers` and `survival` of a `ProbeResult`.

    Returns:
        "ProbeResult", then one line per target; of many targets only the first ones.
    """
    lines = []
    for table, (score, title) in zip(tables, SCORES, strict=True):
        for target, rows in table.groupby("target", sort=False) if len(table) else ():
            rows = rows[rows["n_labelled"] == "all"]
            first, others = rows.iloc[0], rows.iloc[1:]
            line = f"{target}: {title} {_text(first, score)} of {first['embedding']}"
            if len(others):
                best = others.loc[others[score].idxmax()]
                line += f", {_text(best, score)} of {best['embedding']}"
            lines.append(f"{line} ({first['n_slides']} slides, {first['n_patients']} patients)")
    more = [f"and {len(lines) - _LINES} more targets"] if len(lines) > _LINES else []
    return "\n  ".join(["ProbeResult", *lines[:_LINES], *more])


def summary_of(*tables: pd.DataFrame) -> pd.DataFrame:
    """Tabulate scores with intervals as text.

    Args:
        tables: scores of classes, of numbers and of survival, one row per target, number of labels and embedding.

    Returns:
        One row per target and number of labels, one column per embedding; empty without scores.
    """
    parts = []
    for table, (score, title) in zip(tables, SCORES, strict=True):
        if len(table):
            text = table.assign(text=[_text(row, score) for _, row in table.iterrows()], score=title)
            keys = ["target", "score", "n_labelled"]
            methods = list(dict.fromkeys(text["embedding"]))
            order = list(dict.fromkeys(map(tuple, text[keys].to_numpy())))
            parts.append(text.pivot(index=keys, columns="embedding", values="text").loc[order, methods])
    return pd.concat(parts).rename_axis(columns=None) if parts else pd.DataFrame()


def _text(row: pd.Series, score: str) -> str:
    return f"{row[score]:.2f} ({row['low']:.2f} to {row['high']:.2f})"
