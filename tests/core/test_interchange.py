"""Features in the layouts of other tools: as they write them, and there and back."""

from __future__ import annotations

import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from histossl.cli.main import main
from histossl.core import hdf5
from histossl.core.errors import FileFormatError
from histossl.core.interchange import read_tile_features, write_tile_features
from histossl.wsi import tile_files
from histossl.wsi.geometry import Size
from histossl.wsi.tiles import TileGrid, TileSpec

RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(30, 7)).astype(np.float32)
IJ = np.stack(np.divmod(np.arange(30), 5), axis=1)
MPP, EXTENT = 0.499, 224 / 0.499
XY = np.rint(IJ[:, ::-1] * EXTENT).astype(np.int64)


@pytest.fixture
def ours(tmp_path) -> Path:
    grid = TileGrid(TileSpec(224, 1.0), XY, IJ, EXTENT, EXTENT, Size(2500, 3100), MPP)
    tiles, path = tmp_path / "tiles" / "a b.h5", tmp_path / "features" / "a b.h5"
    with tile_files.new_tile_file(tiles, "a b", grid, "t"):
        pass
    with tile_files.new_features_file(path, tiles, "f") as file:
        hdf5.create_features(file, 30, 7)[:] = FEATURES
    return path


def test_ours_becomes_stamp_in_micrometres_and_comes_back(ours, tmp_path):
    path = write_tile_features(read_tile_features(ours), tmp_path / "stamp", "stamp")
    with h5py.File(path) as file:
        assert (file["feats"].dtype, file["coords"].dtype) == (np.float16, np.float32)
        np.testing.assert_allclose(file["coords"][:], XY * MPP, rtol=1e-5)
        assert file.attrs["tile_size_um"] == pytest.approx(224.0)
        assert (file.attrs["tile_size_px"], file.attrs["unit"]) == (224, "um")
    back = write_tile_features(read_tile_features(path, MPP), tmp_path / "back", "trident")
    tiles = tile_files.read_tiles_of(back)
    np.testing.assert_array_equal(tiles.xy, XY)
    assert tiles.extent == pytest.approx(EXTENT)
    assert tiles.size.width >= (XY[:, 0] + EXTENT).max() - 1
    np.testing.assert_allclose(hdf5.read_features(back), FEATURES, atol=2e-3)


def test_trident_keeps_its_attributes(ours, tmp_path):
    back = write_tile_features(read_tile_features(ours), tmp_path / "trident", "trident")
    with h5py.File(ours) as one, h5py.File(back) as other:
        assert dict(one["coords"].attrs) == dict(other["coords"].attrs)
        assert one["coords"].dtype == other["coords"].dtype == np.int64
    np.testing.assert_array_equal(hdf5.read_features(back), FEATURES)


def test_trident_s_own_file_gives_micrometres(tmp_path):
    """20x tiles of 256 px on a slide scanned at 40x: 512 level-0 pixels of 0.25 µm."""
    path = tmp_path / "t.h5"
    with h5py.File(path, "w") as file:
        file["features"] = FEATURES
        file["coords"] = IJ[:, ::-1].astype(np.int64) * 512
        file["coords"].attrs.update({"patch_size": 256, "patch_size_level0": 512, "target_magnification": 20})
    with h5py.File(write_tile_features(read_tile_features(path), tmp_path / "out", "stamp")) as file:
        np.testing.assert_allclose(file["coords"][:], IJ[:, ::-1] * 128)
        assert file.attrs["tile_size_um"] == 128


def test_clam_both_ways(ours, tmp_path):
    h5, pt = (write_tile_features(read_tile_features(ours), tmp_path / name, name) for name in ("clam", "clam-pt"))
    with h5py.File(h5) as file:
        assert (file["features"].dtype, file["coords"].dtype) == (np.float32, np.int64)
    tensor = torch.load(pt, weights_only=True)
    assert (tensor.dtype, tuple(tensor.shape)) == (torch.float32, (30, 7))
    np.testing.assert_array_equal(read_tile_features(pt).features, FEATURES)
    np.testing.assert_array_equal(read_tile_features(h5).xy, XY)
    with pytest.raises(FileFormatError, match="how large its tiles"):
        write_tile_features(read_tile_features(h5), tmp_path / "x", "trident")
    with pytest.raises(FileFormatError, match="place for every feature"):
        write_tile_features(read_tile_features(pt), tmp_path / "x", "stamp")


def test_folders_from_the_command_line(ours, tmp_path, capsys):
    (ours.parent / "bad.h5").write_text("no")
    assert main(["features", "convert", str(ours.parent), "--out", str(tmp_path / "s"), "--to", "stamp"]) == 1
    assert "bad.h5" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["a b.h5"]
    assert main(["features", "convert", str(tmp_path / "s"), "--out", str(tmp_path / "t"), "--to", "trident"]) == 1
    assert "--mpp" in capsys.readouterr().err
    flags = ["--to", "trident", "--mpp", str(MPP)]
    assert main(["features", "convert", str(tmp_path / "s"), "--out", str(tmp_path / "t"), *flags]) == 0
    np.testing.assert_array_equal(tile_files.read_tiles_of(tmp_path / "t" / "a b.h5").xy, XY)
    assert main(["features", "convert", str(ours), "--out", str(tmp_path / "t"), "--to", "excel"]) == 2


def test_what_is_no_features_file_is_refused(tmp_path):
    with (tmp_path / "bomb.pt").open("wb") as file:
        pickle.dump(Path("/"), file)
    with h5py.File(tmp_path / "empty.h5", "w"):
        pass
    with h5py.File(tmp_path / "nan.h5", "w") as file:
        file["features"], file["coords"] = np.full((2, 3), np.nan), np.zeros((2, 2))
    for name in ("bomb.pt", "empty.h5", "nan.h5"):
        with pytest.raises(FileFormatError, match=name):
            read_tile_features(tmp_path / name)
