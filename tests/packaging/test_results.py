"""The page of results says what the tables say."""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from histossl.evaluate.settings import ProbeResult, ProbeSettings
from histossl.evaluate.sources import Source

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
METHODS = {
    "giga-ssl": 0.0,
    "mean pooling": 0.02,
    "attention MIL": 0.1,
    "SparseConvMIL": 0.05,
    "fine-tuned encoder": -0.2,
}


@pytest.fixture(scope="module")
def pages():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("results_page"), importlib.import_module("results")
    sys.path.remove(str(BENCHMARKS))


def table(first, target="label"):
    """Methods that far behind the first, known to within .04."""
    rows = []
    for n in ("25", "50", "all"):
        for name, behind in METHODS.items():
            gap = np.nan if name == "giga-ssl" else behind
            row = {"target": target, "n_labelled": n, "embedding": name, "n_slides": 374, "n_patients": 30}
            row |= {"auroc": first - behind, "low": first - behind - 0.1, "high": first - behind + 0.1}
            rows.append(row | {"difference": gap, "difference_low": gap - 0.04, "difference_high": gap + 0.04})
    return pd.DataFrame(rows)


def result(tables):
    return ProbeResult(pd.concat(tables), pd.DataFrame(), pd.DataFrame(), pd.DataFrame(), (), (), ProbeSettings())


def test_the_table_of_the_readme_is_made_again_and_nothing_else(pages):
    words, _ = pages
    few = table(0.58)
    few = few.assign(embedding=few["embedding"].replace("attention MIL", "untrained encoder"))
    shown = pd.DataFrame(
        [[0.975, 0.951, 1.0], [0.91, 0.839, 1.0], [0.964, 0.56, 0.51]],
        index=["giga-ssl", "untrained encoder", "mean pooling"],
        columns=pd.MultiIndex.from_tuples([(task, 25) for task in ("composition", "needle", "arrangement")]),
    )
    before, after = "a\n<!-- results -->\n", "<!-- /results -->\nz\n"
    found = [words.Found("lymphoma", result([few]), 1, (374, 384))]
    text = words.readme(before + "| old |\n" + after, found, (shown, []))
    assert text.startswith(before)
    assert text.endswith(after)
    assert "old" not in text
    assert "| a few tiles of another tissue | 25 | **.95** | .84 | .56 |" in text
    assert "| CLL, FL or MCL | 50 | **.58** (.48–.68) | .48 (.38–.58) | .56 (.46–.66) |" in text
    assert words.readme("no marks", found, None) == "no marks"


def test_the_page_says_what_the_tables_say(pages, tmp_path):
    words, _ = pages
    found = [
        words.Found("lymphoma", result([table(0.58)]), 91_000_000, (374, 384)),
        words.Found("synthetic", result([table(0.9, "composition"), table(0.95, "lesion")]), 10**9, (192, 384)),
    ]
    split = pd.concat([table(0.9).assign(split="by field"), table(0.6).assign(split="by patient")])
    split = split[(split["n_labelled"] == "all") & (split["embedding"] == "giga-ssl")]
    text = words.page(found, split, ProbeSettings(rivals=("attention",)), "python benchmarks/results.py")
    assert "| synthetic: lesion | .95 (.85–1.05) | .90 (.80–1.00) SparseConvMIL | +.05 (+.01 to +.09) |" in text
    assert "On average +5.0 points, which does not meet the +6.3" in text
    assert (
        "With 50 labelled slides this method is ahead of attention MIL, SparseConvMIL; behind fine-tuned encoder; "
        "not clearly different from mean pooling." in text
    )
    assert text.count("Its interval reaches chance") == 1  # of lymphoma, whose low is .48
    assert "| lymphoma | 374 | 91.0 MB | 0.57 MB (384 numbers a slide, float32) | 158 |" in text
    assert "| this method | .90 (.80–1.00) | .60 (.50–.70) | +30.0 |" in text
    assert "The 374 lymphoma fields are of 30 patients." in text
    assert "150 steps of AdamW" in text
    words.draw_shots_picture(found, tmp_path / "a.png")
    words.draw_split_picture(split, tmp_path / "b.png")
    assert all(Image.open(path).width > 400 for path in tmp_path.iterdir())


def test_the_bar_is_met_where_it_is(pages):
    words, _ = pages
    better = table(0.9)
    better.loc[better["embedding"].isin(words.SUPERVISED), "difference"] = 0.07
    assert "On average +7.0 points, which meets" in words.lead([words.Found("lymphoma", result([better]), 1, (2, 2))])


def test_fields_of_one_patient_flatter(pages, tmp_path):
    """Vectors and pictures that know the patient alone: everything by field, nothing by patient."""
    _, script = pages
    rng = np.random.default_rng(0)
    patient = np.arange(60) // 5
    ids = tuple(f"f{k:02d}" for k in range(60))
    tints = rng.integers(90, 220, size=(12, 3))[patient]
    (tmp_path / "slides").mkdir()
    for name, tint in zip(ids, tints, strict=True):
        noise = rng.integers(-20, 20, size=(32, 32, 3))
        Image.fromarray((tint + noise).astype(np.uint8)).save(tmp_path / "slides" / f"{name}.png")
    classes = rng.permutation(np.arange(12) % 2)[patient]
    rows = {"slide_id": ids, "patient_id": [f"p{p}" for p in patient], "label": [f"c{c}" for c in classes]}
    pd.DataFrame(rows).to_csv(tmp_path / "labels.csv", index=False)

    @dataclass(frozen=True)
    class Made(script.Cohort):
        def embedded(self):
            return True

        def source(self):
            return Source(ids, {"marks": (np.eye(12)[patient] + 0.01 * rng.normal(size=(60, 12))).astype(np.float32)})

    cohort = Made("lymphoma", tmp_path, tmp_path / "slides", tmp_path / "labels.csv")
    quick = ProbeSettings(folds=3, repeats=2, bootstraps=100)
    split = script.by_field_and_by_patient(cohort, quick, tmp_path / "out").set_index(["split", "embedding"])["auroc"]
    for name in ("colour and texture", "marks"):
        assert split["by field", name] > 0.95
        assert split["by patient", name] < 0.85
    assert (tmp_path / "out" / "colours.csv").exists()
