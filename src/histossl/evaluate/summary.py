"""Summaries of a probe: a few lines, or one small table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from histossl.core import answers
from histossl.core.console import say

SCORES = (("auroc", "AUROC"), ("spearman", "Spearman"), ("c_index", "C-index"))
NEW_SITES = ", whole sites held out"  # ends the name of the row that stands beside the first one
_LINES = 6  # targets that are listed


def named(embedding: str) -> str:
    """The name of vectors for people who do not know the method's.

    Args:
        embedding: as files have it.

    Returns:
        The name, with "this method" for Giga-SSL.
    """
    return embedding.replace("giga-ssl", "this method", 1)


def in_words(*tables: pd.DataFrame) -> str:
    """Summarise a probe: the first method's score with all labels, beside the best of the others.

    Args:
        tables: `table`, `numbers` and `survival` of a `ProbeResult`.

    Returns:
        "ProbeResult", then one line per target; of many targets only the first ones.
    """
    lines = []
    for table, (score, title) in zip(tables, SCORES, strict=True):
        for target, rows in table.groupby("target", sort=False) if len(table) else ():
            rows = pd.DataFrame(rows[rows["n_labelled"] == "all"])
            away = np.array([str(name).endswith(NEW_SITES) for name in rows["embedding"]])
            first, others, new_sites = rows.iloc[0], pd.DataFrame(rows[~away]).iloc[1:], pd.DataFrame(rows[away])
            line = f"{target}: {title} {_text(first, score)} of {named(first['embedding'])}"
            if len(others):
                best = others.loc[others[score].idxmax()]
                line += f", {_text(best, score)} of {named(best['embedding'])}"
            line += "".join(f", {_text(row, score)} with whole sites held out" for _, row in new_sites.iterrows())
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


def show_probe(tables: Sequence[pd.DataFrame], audit: Sequence[str], folder: Path) -> None:
    """Print the scores of a probe with their intervals, its audit, and where its files lie.

    Args:
        tables: `table`, `numbers` and `survival` of a `ProbeResult`.
        audit: a line a target.
        folder: that holds the files.
    """
    rows, kinds = [], [title for table, (_, title) in zip(tables, SCORES, strict=True) if len(table)]
    scored = f"{kinds[0] if len(kinds) == 1 else 'score'} (95 % interval)"
    for table, (score, title) in zip(tables, SCORES, strict=True):
        for _, row in table.iterrows():
            ahead = "" if row["difference"] != row["difference"] else f"{row['difference']:+.2f}"
            if ahead:
                ahead += f" ({row['difference_low']:+.2f} to {row['difference_high']:+.2f})"
            rows.append(
                {
                    "target": row["target"],
                    "labelled": row["n_labelled"],
                    "vectors": named(str(row["embedding"])),
                    scored: _text(row, score) if len(kinds) == 1 else f"{title} {_text(row, score)}",
                    "the first is ahead by": ahead,
                }
            )
    everything = [row for table in tables for row in table.to_dict("records")]
    answers.give_rows("scores", rows, value=everything)
    answers.give("audit", list(audit))
    answers.give("folder", str(folder))
    for line in audit:
        say(f"audit of {line}")
    written = next(name for name, t in zip(("probe", "numbers", "survival"), tables, strict=True) if len(t))
    say(f"done: {folder / written}.csv", "green")


def _text(row: pd.Series, score: str) -> str:
    return f"{row[score]:.2f} ({row['low']:.2f} to {row['high']:.2f})"
