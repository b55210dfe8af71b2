"""Slides to vectors to a probe without a study: the same bytes as the command line gives."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest

import histossl as hs
from histossl.cli.main import main
from histossl.core.argument_names import as_arguments
from histossl.core.errors import FileFormatError, LabelError, SettingsError, SlideError

TILE = hs.TileSpec(px=64, mpp=1.0)
ENCODE = {"views": 2, "tiles": 12}
PRETRAIN = {"epochs": 2, "view": {"tiles": 12}, "encoder": {"dim": 16, "prototypes": 4}}
PROBE = {"folds": 2, "repeats": 2, "bootstraps": 100}
FLAGS = [
    *("--tile.px=64", "--tile.mpp=1.0", "--encode.views=2", "--encode.tiles=12", "--pretrain.epochs=2"),
    *("--pretrain.view.tiles=12", "--pretrain.encoder.dim=16", "--pretrain.encoder.prototypes=4"),
    *("--probe.folds=2", "--probe.repeats=2", "--probe.bootstraps=100", "--workers=1", "--device=cpu"),
]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort")
    hs.write_cohort(folder, slides=8, width=256, height=320, seed=3)
    return folder


@pytest.fixture(scope="module")
def study(cohort):
    """What the command makes of the same slides."""
    labels = ["--labels", str(cohort / "labels.csv")]
    assert main(["run", str(cohort / "slides"), "--out", str(cohort / "study"), *labels, *FLAGS]) == 0
    return hs.Study(cohort / "study")


@pytest.fixture(scope="module")
def features(cohort):
    return hs.encode(cohort / "slides", "self", TILE, device="cpu", **ENCODE)


@pytest.fixture(scope="module")
def encoder(features):
    return hs.pretrain(features, device="cpu", **PRETRAIN)


@pytest.fixture(scope="module")
def vectors(features, encoder):
    return hs.embed(features, encoder, device="cpu")


def test_features_are_those_of_the_command(study, features):
    theirs = hs.read_features(study)
    assert list(features) == list(theirs) == [f"slide-{k:03d}" for k in range(1, 9)]
    for name, found in features.items():
        np.testing.assert_array_equal(found.features, theirs[name].features)
        np.testing.assert_array_equal(found.xy, theirs[name].xy)
        assert found.features.shape == (len(found.xy), 128)


def test_vectors_are_those_of_the_command(study, vectors):
    theirs = hs.read_embeddings(study)
    np.testing.assert_array_equal(vectors.X, theirs.X)
    assert set(vectors.obsm) == set(theirs.obsm) == {"mean_pooling", "untrained_encoder"}
    for name in vectors.obsm:
        np.testing.assert_array_equal(vectors.obsm[name], theirs.obsm[name])
    own = vectors.obs.columns.drop("patient_id")  # the command's probe has added patients and labels
    pd.testing.assert_frame_equal(vectors.obs[own], theirs.obs[own], check_categorical=False, check_dtype=False)
    assert {"composition", "lesion", "arrangement"} <= set(theirs.obs)
    assert theirs.obs["patient_id"].nunique() == 4


def test_a_study_goes_on_in_python(study, vectors):
    again = hs.embed(study, study.slide_encoder, device="cpu", baselines=False)
    np.testing.assert_array_equal(again.X, vectors.X)
    assert not again.obsm


def test_the_probe_is_that_of_the_command(cohort, study, vectors):
    result = hs.probe(vectors, cohort / "labels.csv", **PROBE)
    theirs = pd.read_csv(study.folder / "probe.csv", dtype={"n_labelled": str})
    pd.testing.assert_frame_equal(result.table.reset_index(drop=True), theirs, atol=1e-6, check_dtype=False)


def test_labels_may_come_in_any_form(cohort, vectors):
    table = pd.read_csv(cohort / "labels.csv")
    patients = table.set_index("slide_id")["patient_id"]
    series = table.set_index("slide_id")["composition"].sample(frac=1, random_state=0)  # order does not count
    one = hs.probe(vectors, table, targets="composition", **PROBE).table
    data = vectors.copy()
    data.obs["patient_id"], data.obs["grade"] = patients, series
    for vectors_too, labels, given in (
        (vectors, series, patients),
        (vectors, table["composition"].to_numpy(), patients),
        (data, "grade", None),
    ):
        found = hs.probe(vectors_too, labels, patients=given, **PROBE).table
        pd.testing.assert_series_equal(found["auroc"], one["auroc"])
        assert found["n_patients"].tolist() == one["n_patients"].tolist()
    frame = pd.DataFrame(vectors.X, index=vectors.obs_names)
    assert hs.probe(frame, table, targets="composition", **PROBE).table["auroc"][0] == one["auroc"][0]
    assert hs.probe(vectors.X, series.loc[vectors.obs_names].to_numpy(), **PROBE).table["n_slides"][0] == 8


def test_arrays_in_memory_are_features_too(features, encoder, vectors):
    arrays = {name: features[name] for name in ("slide-001", "slide-002")}
    cohort = hs.read_features(arrays)
    assert repr(cohort).startswith("CohortFeatures(2 slides, ")
    np.testing.assert_array_equal(hs.embed(cohort, encoder, device="cpu").X, vectors.X[:2])
    bare = hs.TileFeatures("a", np.ones((4, 128), np.float32), features["slide-001"].xy[:4], 64.0, stride=64.0)
    assert hs.embed({"a": bare}, encoder, device="cpu").shape == (1, encoder.settings.vector_dim)


def test_a_folder_for_the_features_is_opened_again_and_nothing_is_made_twice(cohort, features, tmp_path):
    paths = hs.find_slides(cohort / "slides")[:2]
    made = hs.encode(paths, "random", TILE, out=tmp_path, device="cpu")
    files = sorted(tmp_path.glob("features/*.h5"))
    before = [path.stat().st_mtime_ns for path in files]
    assert len(files) == len(made) == 2
    hs.encode(paths, "random", TILE, out=tmp_path, device="cpu")
    assert [path.stat().st_mtime_ns for path in files] == before
    again = hs.read_features(tmp_path)
    np.testing.assert_array_equal(again["slide-002"].features, made["slide-002"].features)
    assert len(hs.read_features(files[0])) == 1
    assert not [source for source in again.sources if source.views.exists()]


def test_a_tile_encoder_of_its_own(cohort, features, tmp_path):
    slides = hs.find_slides(cohort / "slides")
    encoder = hs.pretrain_tiles(slides, TILE, out=tmp_path / "tiles", device="cpu")
    one = hs.encode(slides[0], encoder, TILE, device="cpu")
    np.testing.assert_array_equal(one["slide-001"].features, features["slide-001"].features)
    assert hs.load_encoder(tmp_path / "tiles").identity == encoder.identity
    assert repr(encoder) == "TileEncoder('model.safetensors', tiles -> 128 numbers, float32 on cpu, trained at mpp 1)"


def test_slides_that_fail_are_left_out_and_named(cohort, tmp_path):
    (tmp_path / "broken.tif").write_bytes(b"no slide")
    slides = [*hs.find_slides(cohort / "slides")[:1], tmp_path / "broken.tif"]
    with pytest.warns(UserWarning, match=r"1 of 2 slides are left out: broken\.tif"):
        found = hs.encode(slides, "random", TILE, device="cpu")
    assert list(found) == ["slide-001"]
    assert "broken.tif" in found.failed["broken"]
    with pytest.raises(SlideError, match="none of 1 slides can be used"):
        hs.encode(tmp_path / "broken.tif", "random", TILE)


def test_slides_most_like_a_slide(cohort, vectors):
    patients = pd.read_csv(cohort / "labels.csv").set_index("slide_id")["patient_id"]
    found = hs.search(vectors, "slide-003", top=4, patients=patients)
    assert list(found.columns) == ["slide_id", "patient_id", "similarity"]
    assert len(found) == 4
    assert patients["slide-003"] not in set(found["patient_id"])
    assert found["similarity"].is_monotonic_decreasing
    assert "slide-003" not in set(hs.search(vectors, 2, top=7)["slide_id"])
    with pytest.raises(FileFormatError, match="no slide 'slide-3'; the slides are called slide-001"):
        hs.search(vectors, "slide-3")


def test_folds_keep_patients_together():
    labels, patients = np.repeat(["a", "b"], 12), np.arange(24) // 2
    folds = hs.patient_folds(labels, patients, folds=3)
    assert folds.shape == (24,)
    assert set(folds) == {0, 1, 2}
    for fold in range(3):
        assert not set(patients[folds == fold]) & set(patients[folds != fold])
        assert set(labels[folds == fold]) == {"a", "b"}


def test_reprs_are_short(study, encoder, vectors, cohort):
    assert repr(study).endswith("slide-encoder, embeddings.h5ad, report.html)")
    assert "8 slides: 8 encoded" in repr(study)
    assert study._repr_html_().count("<tr>") == 9
    assert repr(encoder).startswith("SlideEncoder(neighbours, tiles of 128 numbers -> slides of ")
    assert repr(encoder).endswith("trained on 8 slides)")
    result = hs.probe(vectors, cohort / "labels.csv", **PROBE)
    assert len(repr(result).splitlines()) == 4
    assert result.summary().shape == (3, 3)
    assert "<table" in result._repr_html_()


def test_errors_name_arguments(cohort, vectors, features):
    with pytest.raises(SettingsError, match=r"pretrain_tiles\(slides\)"):
        hs.load_encoder("self")
    with pytest.raises(FileFormatError, match="timm:NAME, hf:NAME"):
        hs.load_encoder("UNI")
    with pytest.raises(SettingsError, match="PretrainSettings has no setting epoch"):
        hs.pretrain(features, epoch=3)
    with pytest.raises(LabelError, match="labels of shape"):
        hs.probe(vectors, [0, 1])
    with pytest.raises(LabelError) as caught:
        hs.probe(vectors, cohort / "labels.csv", targets="composition", folds=7)
    assert "--" not in str(caught.value)
    assert "folds=2" in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "arguments"),
    [
        ("--probe.folds 3", "folds=3"),
        ("fewer --probe.folds, or another --probe.seed", "fewer folds, or another seed"),
        ("instead: --probe.mixed-patients true", "instead: mixed_patients=True"),
        ("leave whole patients out: --probe.hold-out patients", "leave whole patients out: hold_out='patients'"),
        ("--tile.px 32 or more, or --encoder random", "tile=TileSpec(px=32) or more, or encoder='random'"),
        ("lower --tile.min-tissue", "lower tile=TileSpec(min_tissue=...)"),
        ("or pass --mpp-default for the slides", "or pass mpp_default for the slides"),
        ("run `histossl embed` first", "run histossl.embed first"),
        ("run `histossl inspect SLIDES --out` first", "run histossl.encode first"),
        ("a - b -- c", "a - b -- c"),
    ],
)
def test_flags_as_arguments(flags, arguments):
    assert as_arguments(flags) == arguments


def test_nothing_of_it_warns(cohort):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        hs.encode(hs.find_slides(cohort / "slides")[0], "random", TILE, device="cpu")
