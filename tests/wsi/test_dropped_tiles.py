"""Tiles of dropped artefacts: left out of features and views, counted, and gone as a false signal."""

import h5py
import numpy as np
import pytest

from histossl.encoders.encode import EncodeJob, EncodeSettings
from histossl.encoders.encode_slides import encode_slides
from histossl.encoders.tile_encoder import load_encoder
from histossl.execution.workers import ThreadExecutor
from histossl.study.survey import SurveyJob, survey_slide
from histossl.wsi import tile_files
from histossl.wsi.artefacts import KINDS, judge, left_out_of
from histossl.wsi.synth import SynthSettings, write_slide
from histossl.wsi.tiles import TileSpec
from histossl.wsi.tissue import TissueSettings

ENCODER = load_encoder("random", 0, "cpu", "float32")


def test_each_tile_is_left_out_for_one_reason():
    scores = np.zeros((4, len(KINDS)), np.float32)
    fold, blur = KINDS.index("fold"), KINDS.index("blur")
    scores[0, fold], scores[1, blur], scores[2, [fold, blur]], scores[3, 0] = 0.5, 0.8, (0.06, 0.9), 1
    kept, found = judge(scores, ("fold", "blur"))
    assert kept.tolist() == [False, False, False, True]
    assert (found.left_out[fold], found.left_out[blur], found.left_out.sum()) == (1, 2, 3)
    assert np.array_equal(left_out_of(str(found)), found.left_out)
    assert judge(scores, ("pen",))[0].tolist() == [True, True, True, False]
    assert judge(scores, ())[0].all()


def encoded(folder, path, drop, views=2):
    folder.mkdir()
    tissue, spec = TissueSettings(drop=drop), TileSpec(128, 1.0)
    job = SurveyJob("s", path, None, None, tissue, spec, folder / "t.h5", folder / "qc.jpg")
    survey = survey_slide(job)
    work = EncodeJob("s", path, survey.mpp, spec, folder / "t.h5", folder / "f.h5", folder / "v", drop)
    *_, last = encode_slides([work], ENCODER, EncodeSettings(views=views, tiles=16, batch=8), ThreadExecutor())
    assert last.finished, last.error
    return survey, last


@pytest.mark.parametrize("cached", [True, False])
def test_dropped_tiles_have_no_features_and_no_views(tmp_path, monkeypatch, cached):
    from histossl.encoders import encode

    if not cached:
        monkeypatch.setattr(encode, "CACHE_BYTES", 0)
    path = tmp_path / "s.tiff"
    write_slide(path, SynthSettings(1200, 1000, seed=3, artefacts=("fold", "blur")))
    _, every = encoded(tmp_path / "all", path, ())
    survey, last = encoded(tmp_path / "some", path, ("fold", "blur"))
    whole = tile_files.read_artefacts(tmp_path / "all" / "f.h5")
    kept, _ = judge(whole.scores, ("fold", "blur"))
    assert 0 < (~kept).sum() < len(kept)
    with h5py.File(tmp_path / "all" / "f.h5") as a, h5py.File(tmp_path / "some" / "f.h5") as b:
        assert np.array_equal(a["coords"][:][kept], b["coords"][:])
        assert np.allclose(a["features"][:][kept], b["features"][:], atol=1e-5)
        assert np.array_equal(a["artefacts"][:][kept], b["artefacts"][:])
        assert list(b["artefacts"].attrs["kinds"]) == list(KINDS)
        assert dict(b["coords"].attrs)["patch_size"] == 128
        there = {tuple(xy) for xy in b["coords"][:].tolist()}
    views = np.load(tmp_path / "some" / "v" / "coords.npy")
    assert {tuple(xy) for xy in views.reshape(-1, 2).tolist()} <= there
    assert left_out_of(str(last.artefacts)).sum() == (~kept).sum()
    assert left_out_of(survey.artefacts)[KINDS.index("fold")] > 0
    assert not left_out_of(str(every.artefacts)).any()


def test_a_slide_that_shows_nothing_else_is_refused(tmp_path):
    path, folder = tmp_path / "s.tiff", tmp_path / "o"
    write_slide(path, SynthSettings(700, 700, seed=3))
    folder.mkdir()
    spec, drop = TileSpec(128, 1.0), ("blur",)
    survey = survey_slide(
        SurveyJob("s", path, None, None, TissueSettings(drop=drop), spec, folder / "t.h5", folder / "q")
    )
    work = EncodeJob("s", path, survey.mpp, spec, folder / "t.h5", folder / "f.h5", folder / "v", drop)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("histossl.wsi.artefacts._SHARP", 99.0)
        *_, last = encode_slides([work], ENCODER, EncodeSettings(views=0), ThreadExecutor())
    assert "no tile is left" in str(last.error)
    assert not (folder / "f.h5").exists()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_dropping_artefacts_takes_a_false_signal_away(tmp_path):
    """Each slide comes twice; the twin has folds and is of the other class, so nothing else tells them apart.

    Tiles are full of tissue: folds lie inside of it, so what is left where they are dropped is more of its edge. With
    tiles at the edge this alone tells the classes apart, though no fold were painted.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    import histossl as hs

    names = [f"s{k:02d}-{kind}" for k in range(20) for kind in ("clean", "folded")]
    for name in names:
        artefacts = ("fold",) * 3 if name.endswith("folded") else ()
        settings = SynthSettings(1400, 1200, seed=int(name[1:3]), patient=int(name[1:3]), artefacts=artefacts)
        write_slide(tmp_path / f"{name}.tiff", settings)

    def auroc(drop):
        cohort = hs.encode(tmp_path, ENCODER, TileSpec(112, 1.0, min_tissue=0.99), tissue=TissueSettings(drop=drop))
        vectors = np.stack([cohort[name].features.mean(0) for name in names])
        labels, twins = np.arange(len(names)) % 2, np.arange(len(names)) // 2
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        scores = cross_val_predict(model, vectors, labels, groups=twins, cv=GroupKFold(5), method="decision_function")
        return roc_auc_score(labels, scores)

    before, after = auroc(()), auroc(("fold",))
    assert before > 0.9
    assert abs(after - 0.5) < 0.05
