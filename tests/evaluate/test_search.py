"""Search against brute force, and what must be so."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from histossl.cli.main import main
from histossl.evaluate.labels import Labels
from histossl.evaluate.search import nearest, picture, retrieval


def labels_of(classes, patients):
    ids = [f"s{k:03d}" for k in range(len(classes))]
    table = pd.DataFrame({"patient_id": [f"p{p}" for p in patients], "label": [f"c{c}" for c in classes]}, index=ids)
    return ids, Labels(table, ("label",))


def by_hand(values, classes, patients):
    x = (values - values.mean(0)) / values.std(0)
    recalls, averages = [], []
    for q in range(len(x)):
        scored = []
        for k in range(len(x)):
            if patients[k] != patients[q]:
                cosine = (x[q] @ x[k]) / np.sqrt((x[q] @ x[q]) * (x[k] @ x[k]))
                scored.append((-cosine, classes[k] == classes[q]))
        ranked = [hit for _, hit in sorted(scored)]
        if any(ranked):
            recalls.append([any(ranked[:k]) for k in (1, 5, 10)])
            averages.append(np.mean([sum(ranked[: k + 1]) / (k + 1) for k in range(len(ranked)) if ranked[k]]))
    return [*np.mean(recalls, axis=0), np.mean(averages), len(averages)]


def test_retrieval_equals_a_count_by_hand():
    rng = np.random.default_rng(0)
    patients, classes = rng.integers(12, size=40), rng.integers(3, size=40)
    classes[7], patients[7] = 3, 99  # alone in its class: it cannot ask
    values = rng.normal(size=(40, 6)) + classes[:, None]
    ids, labels = labels_of(classes, patients)
    row = retrieval({"x": values}, ids, labels, bootstraps=100).iloc[0]
    found = [row[name] for name in ("recall@1", "recall@5", "recall@10", "map", "queries")]
    np.testing.assert_allclose(found, by_hand(values, classes, patients), rtol=1e-6)
    assert row["map_low"] < row["map"] < row["map_high"]


def test_a_slide_of_the_same_patient_is_never_a_hit():
    """Slides of a patient are near each other and classes are chance: with them, retrieval would be perfect."""
    rng = np.random.default_rng(1)
    patients = np.arange(120) // 4
    classes = rng.permutation(np.arange(30) % 2)[patients]
    values = rng.normal(size=(30, 16))[patients] + 0.01 * rng.normal(size=(120, 16))
    ids, labels = labels_of(classes, patients)
    table = retrieval({"x": values}, ids, labels, bootstraps=100).set_index("embedding")
    assert table.loc["x", "recall@1"] < 0.8
    assert abs(table.loc["x", "map"] - table.loc["chance", "map"]) < 0.12
    for query in (0, 77):
        hits = nearest(values, patients, query, 116)
        assert len(hits) == 116
        assert patients[query] not in patients[[hit.row for hit in hits]]
        assert [h.similarity for h in hits] == sorted((h.similarity for h in hits), reverse=True)


def test_similarity_does_not_depend_on_units_or_on_what_all_slides_share():
    rng = np.random.default_rng(2)
    values = rng.normal(size=(30, 5))
    plain = nearest(values, np.arange(30), 3, 5)
    moved = nearest(values * np.logspace(-2, 3, 5) + 100, np.arange(30), 3, 5)
    assert [hit.row for hit in plain] == [hit.row for hit in moved]
    np.testing.assert_allclose([h.similarity for h in plain], [h.similarity for h in moved], atol=1e-4)
    with_constant = nearest(np.column_stack([values, np.full(30, 7.1)]), np.arange(30), 3, 5)
    assert [hit.row for hit in plain] == [hit.row for hit in with_constant]
    np.testing.assert_allclose([h.similarity for h in plain], [h.similarity for h in with_constant], atol=1e-6)


@pytest.fixture
def cohort(tmp_path):
    rng = np.random.default_rng(3)
    ids = [f"s{k}" for k in range(20)]
    table = pd.DataFrame(rng.normal(size=(20, 4))).add_prefix("f").assign(slide_id=ids)
    table.assign(patient_id=[f"p{k // 2}" for k in range(20)]).to_csv(tmp_path / "v.csv", index=False)
    pd.DataFrame({"slide_id": ids, "label": np.arange(20) // 2 % 2}).to_csv(tmp_path / "l.csv", index=False)
    return tmp_path


def test_search_writes_hits_and_scores(cohort, capsys):
    flags = ["--labels", str(cohort / "l.csv"), "--out", str(cohort / "out"), "--top", "6"]
    assert main(["search", str(cohort / "v.csv"), "/some/where/s4.svs", *flags]) == 0
    hits = pd.read_csv(cohort / "out" / "hits.csv")
    assert len(hits) == 6
    assert "p2" not in set(hits["patient_id"])
    assert set(pd.read_csv(cohort / "out" / "retrieval.csv")["embedding"]) == {"v", "chance"}
    with Image.open(cohort / "out" / "hits.jpg") as sheet:
        assert sheet.width > sheet.height > 600
    assert "s4 among 20 slides" in capsys.readouterr().err
    assert main(["search", str(cohort / "v.csv"), "S4"]) == 0
    assert "s4 among 20 slides" in capsys.readouterr().err
    assert main(["search", str(cohort / "v.csv"), "s4x"]) == 2
    assert "'s4'" in capsys.readouterr().err


def test_the_picture_shows_what_there_is_and_says_what_is_not(tmp_path):
    red = np.zeros((40, 90, 3), np.uint8)
    red[..., 0] = 255
    Image.fromarray(red).save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    frames = [("ü" * 80, None, tmp_path / "red.png"), ("b", tmp_path / "broken.png", None), ("c\nd", None, None)]
    sheet = np.asarray(picture(frames, side=100, columns=2))
    assert (sheet[50:70, 30:90] == [255, 0, 0]).all()
    assert not (sheet[:, 130:] == [255, 0, 0]).all(axis=-1).any()
