"""Files are whole or absent, and hold what other tools expect."""

from __future__ import annotations

import os

import h5py
import numpy as np
import pytest

from histossl.core import atomic, fingerprints, hdf5, tables
from histossl.core.config import differences, fingerprint, from_dict, to_dict
from histossl.core.errors import FileFormatError, SettingsError, SlideError, StudyError
from histossl.encoders.encode import EncodeSettings
from histossl.study.folder import COLUMNS, Study
from histossl.wsi import tile_files
from histossl.wsi.geometry import Size
from histossl.wsi.tiles import TileGrid, TileSpec


def grid(n: int = 700) -> TileGrid:
    ij = np.stack(np.divmod(np.arange(n), 40), axis=1)
    xy = np.rint(ij[:, ::-1] * 433.7).astype(np.int64)
    return TileGrid(TileSpec(px=224, mpp=1.0, overlap=24), xy, ij, 433.7, 485.75, Size(20_000, 9_000), 0.4611)


def test_whole_leaves_nothing_behind_on_failure(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(OSError, match="disk"), atomic.whole(path) as part:
        part.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("text", ["write failed: errno = 28, error message", "IoError(Os { No space }) (os error 28)"])
def test_a_full_disk_that_a_library_tells_in_words_is_an_error_of_the_disk(tmp_path, text):
    for write in (atomic.whole, atomic.whole_folder):
        with pytest.raises(OSError, match=os.strerror(28)) as found, write(tmp_path / "a.h5"):
            raise RuntimeError(text)
        assert found.value.errno == 28
    assert not list(tmp_path.iterdir())


def test_whole_replaces_and_names_of_255_bytes_work(tmp_path):
    path = tmp_path / ("汉" * 83 + ".txt")
    for text in ("one", "two"):
        with atomic.whole(path) as part:
            assert not path.exists() or path.read_text() == "one"
            part.write_text(text)
    assert path.read_text() == "two"
    assert len(list(tmp_path.iterdir())) == 1


def test_whole_folder_appears_at_once(tmp_path):
    target = tmp_path / "views" / "s"
    with pytest.raises(RuntimeError), atomic.whole_folder(target) as part:
        (part / "x").write_text("half")
        raise RuntimeError
    assert not target.exists()
    for text in ("one", "two"):
        with atomic.whole_folder(target) as part:
            (part / "x").write_text(text)
    assert (target / "x").read_text() == "two"
    assert [p.name for p in target.parent.iterdir()] == ["s"]


def test_tile_files_carry_trident_attributes(tmp_path):
    tiles, features = tmp_path / "tiles" / "s.h5", tmp_path / "features" / "s.h5"
    with tile_files.new_tile_file(tiles, "s", grid(), "abc"):
        pass
    with tile_files.new_features_file(features, tiles, "def") as file:
        hdf5.create_features(file, 700, 8)[:] = np.arange(5600).reshape(700, 8)
    with h5py.File(features) as file:
        attrs = dict(file["coords"].attrs)
        assert file["coords"].dtype == np.int64
        assert file["features"].dtype == np.float32
        assert file["features"].chunks == (256, 8)
    assert attrs["patch_size"] == 224
    assert attrs["patch_size_level0"] == 486
    assert (attrs["level0_width"], attrs["level0_height"]) == (20_000, 9_000)
    assert attrs["target_magnification"] == 10
    assert attrs["level0_magnification"] == pytest.approx(10 / 0.4611, abs=1e-3)
    assert attrs["overlap"] == 24
    assert attrs["name"] == "s"
    assert attrs["savetodir"] == "features"
    found = tile_files.read_tiles_of(features)
    np.testing.assert_array_equal(found.xy, grid().xy)
    assert (found.stride, found.extent, found.size) == (433.7, 485.75, Size(20_000, 9_000))
    assert found.fingerprint == "def"
    np.testing.assert_array_equal(hdf5.read_features(features), np.arange(5600).reshape(700, 8))
    assert fingerprints.fingerprint_of(features) == "def"


def test_files_of_trident_itself_are_read(tmp_path):
    path = tmp_path / "t.h5"
    with h5py.File(path, "w") as file:
        file["features"] = np.ones((1, 3, 4), np.float32)
        file["coords"] = np.array([[0, 512], [512, 512], [1024, 0]])
        file["coords"].attrs.update(
            patch_size=256, patch_size_level0=512, level0_width=3000, level0_height=2000, overlap=0
        )
    found = tile_files.read_tiles_of(path)
    assert (found.stride, found.extent) == (512, 512)
    assert hdf5.read_features(path).shape == (3, 4)


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "s.h5"
    with pytest.raises(FileFormatError, match="does not exist"):
        hdf5.read_features(path)
    path.write_text("text")
    with pytest.raises(FileFormatError, match="not a readable HDF5"):
        hdf5.read_features(path)
    with h5py.File(path, "w") as file:
        file["coords"] = np.zeros((2, 2), np.int64)
        file["features"] = np.array([[0.0, 1.0], [np.nan, 1.0]])
    with pytest.raises(FileFormatError, match="patch_size_level0"):
        tile_files.read_tiles_of(path)
    with pytest.raises(FileFormatError, match="first of tile 1"):
        hdf5.read_features(path)
    with h5py.File(path, "w") as file:
        file["other"] = 1
    with pytest.raises(FileFormatError, match="only other"):
        hdf5.read_features(path)
    assert fingerprints.fingerprint_of(path) is None


def test_the_same_content_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        with tile_files.new_tile_file(tmp_path / name / "tiles" / "s.h5", "s", grid(), "abc"):
            pass
    one, two = ((tmp_path / name / "tiles" / "s.h5").read_bytes() for name in ("a", "b"))
    assert one == two


def test_settings_travel_through_json_and_unknown_keys_are_errors():
    settings = EncodeSettings(views=3, precision="float32")
    assert from_dict(EncodeSettings, to_dict(settings)) == settings
    with pytest.raises(SettingsError, match="vieuws"):
        from_dict(EncodeSettings, {"vieuws": 3})
    with pytest.raises(SettingsError, match="cropp"):
        from_dict(EncodeSettings, {"augment": {"cropp": 0.3}})


def test_every_field_enters_the_fingerprint():
    base = to_dict(EncodeSettings())
    seen = {fingerprint(EncodeSettings())}
    for name, value in base.items():
        if isinstance(value, dict):
            changed = [
                from_dict(EncodeSettings, base | {name: value | {k: v / 2 or 0.1}})
                for k, v in value.items()
                if not isinstance(v, bool)
            ]
        else:
            words = {"stain_method": "reinhard"}
            text = words.get(name, "float32")
            other = {int: lambda v: v + 1, float: lambda v: v / 2, str: lambda _, text=text: text}[type(value)](value)
            changed = [from_dict(EncodeSettings, base | {name: other})]
        for settings in changed:
            assert fingerprint(settings) not in seen
            seen.add(fingerprint(settings))
    assert fingerprint(TileSpec()) != fingerprint(to_dict(TileSpec()))
    assert differences(base, base | {"views": 3, "augment": base["augment"] | {"crop": 1.0}}) == [
        "augment.crop: 0.5 -> 1.0",
        f"views: {base['views']} -> 3",
    ]


def test_errors_travel_between_processes():
    import pickle

    error = SlideError("/x/a b.svs", "two\nlines", "do this")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "a b.svs: two lines; do this"
    assert again.path == error.path


@pytest.mark.parametrize(
    "text", ["", "a", "=1+1", "'=1", "''@x", "-a", "+", "@SUM(A1)", "\t=1", "'a", "it's", "'", "-1+1", "-1\n=2", "+1e"]
)
def test_no_cell_is_a_formula_and_each_is_read_back(tmp_path, text):
    assert not tables.cell(text).startswith(("=", "+", "-", "@", "\t", "\r"))
    assert tables.text_of(tables.cell(text)) == text
    study = Study(tmp_path)
    row = dict.fromkeys(COLUMNS, "") | {"slide_id": text, "path": "/p", "patient_id": text, "mine": text}
    study.write_slides([row])
    assert study.slides() == [row]
    for name in ("..", "a/b", "../x", "", ".", "a\\b", "a\0b"):
        with pytest.raises(StudyError, match="cannot name a slide"):
            study.features(name)


@pytest.mark.parametrize("value", [-1, -0.5, float("inf"), None, True, "-0.5", "+3", "-1e-05", "7", "-.5"])
def test_numbers_stay_numbers_in_cells(value):
    assert tables.cell(value) is value
    assert tables.text_of(str(value)) == str(value)


def test_the_tables_of_results_hold_no_formula_and_are_read_back(tmp_path):
    import pandas as pd

    from histossl.cli.evaluate_commands import _write

    names = ['=HYPERLINK("http://x";"y")', "-a.svs", "@b", "c", "'=d"]
    _write(tmp_path / "hits.csv", pd.DataFrame({"slide_id": names, "similarity": [-0.5, 0.25, -1, 1, 0], "rank": 1}))
    lines = (tmp_path / "hits.csv").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if line.lstrip('"').startswith(("=", "-", "@"))]
    assert lines[2] == "'-a.svs,0.250000,1"
    rows = tables.read_rows(tmp_path / "hits.csv")
    assert [row["slide_id"] for row in rows] == names
    assert [float(row["similarity"]) for row in rows] == [-0.5, 0.25, -1, 1, 0]
