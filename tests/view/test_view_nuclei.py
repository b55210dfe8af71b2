"""Nuclei in the viewer: every outline once, where it is, from every kind of file."""

from __future__ import annotations

import io
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from histossl.core.errors import FileFormatError
from histossl.nuclei.export import write_geojson, write_parquet
from histossl.view.outlines import read_outlines
from histossl.wsi.geometry import Size
from support.viewed import TOKEN, app, ask, folder, squares, viewer  # noqa: F401 - fixtures


def unpacked(data: bytes, cell: int, side: int, columns: int) -> list[np.ndarray]:
    count = int(np.frombuffer(data, "<u4", 1)[0])
    sizes = np.frombuffer(data, "<u2", count, 4)
    steps = np.frombuffer(data, "<i2", -1, 4 + 2 * count).reshape(-1, 2)
    corner = np.array([cell % columns, cell // columns]) * side
    return np.split(steps / 4 + corner, np.cumsum(sizes)[:-1])


def test_the_cells_hold_every_nucleus_once_where_it_is(app):
    about = ask(app, f"/{TOKEN}/slides/0/nuclei.json").json()
    assert (about["count"], sum(about["cells"].values())) == (300, 300)
    found = []
    for cell, count in about["cells"].items():
        part = unpacked(
            ask(app, f"/{TOKEN}/slides/0/nuclei/{cell}.bin").body, int(cell), about["side"], about["columns"]
        )
        assert len(part) == count
        found += part
    truth = squares(300, Size(700, 900))
    middles = truth.points.reshape(-1, 4, 2).mean(1)
    for ring in found:
        gap = np.abs(middles - ring[:-1].mean(0)).max(1)  # closed: the first point stands twice
        assert gap.min() < 0.3
        middles[gap.argmin()] = np.inf
    assert ask(app, f"/{TOKEN}/slides/0/nuclei/999999.bin").body == bytes(4)
    picture = ask(app, f"/{TOKEN}/slides/0/nuclei.png")
    assert (picture.headers["content-type"], picture.picture().shape[2]) == ("image/png", 4)


@pytest.mark.parametrize("ending", [".geojson", ".geojson.gz", ".parquet", "qupath"])
def test_nuclei_are_the_same_from_every_kind_of_file(tmp_path, ending):
    size, nuclei = Size(3000, 2000), squares(900, Size(3000, 2000), 3)
    write_geojson(tmp_path / "ours.geojson", [nuclei], 0.5)
    path = tmp_path / f"a{ending}"
    if ending == ".parquet":
        pytest.importorskip("pyarrow")
        write_parquet(path, [nuclei], 0.5)
    elif ending == "qupath":
        path = tmp_path / "a.geojson"
        path.write_text(json.dumps(json.loads((tmp_path / "ours.geojson").read_text()), indent=2))
    else:
        write_geojson(path, [nuclei], 0.5)
    one, other = read_outlines(tmp_path / "ours.geojson", size), read_outlines(path, size)
    assert len(other) == 900
    assert 0 < other.about()["reach"] < 30  # crooked squares of at most 16 pixels, whose middle lies within
    assert other.about()["reach"] == pytest.approx(reach_of(other), abs=0.01)
    np.testing.assert_array_equal(one.cell, other.cell)
    np.testing.assert_allclose(one.middles, other.middles, atol=2)
    assert (np.diff(other.cell) >= 0).all()


def reach_of(found) -> float:
    """How far outlines leave their cells, one by one."""
    most = 0.0
    for k, cell in enumerate(found.cell):
        ring = found.points[found.start[k] : found.start[k + 1]]
        left, top = (cell % found.columns) * found.side, (cell // found.columns) * found.side
        over = np.concatenate([[left, top] - ring.min(0), ring.max(0) - [left + found.side, top + found.side]])
        most = max(most, float(over.max()))
    return most


@pytest.mark.parametrize("block", [700, 5000])
def test_nuclei_are_the_same_wherever_the_file_is_cut_to_read_it(tmp_path, monkeypatch, block):
    size = Size(3000, 2000)
    write_geojson(tmp_path / "a.geojson", [squares(40, size).shifted(-300, -20, 1.5)], 0.5)  # negative numbers, too
    truth = json.loads((tmp_path / "a.geojson").read_text())["features"]
    monkeypatch.setattr("histossl.view.outlines._BLOCK", block)
    found = read_outlines(tmp_path / "a.geojson", size)
    rings = [found.points[a:b].tolist() for a, b in itertools.pairwise(found.start)]
    want = [np.float32(one["geometry"]["coordinates"][0]).tolist() for one in truth]
    assert sorted(rings) == sorted(want)


@pytest.mark.parametrize("broken", ["[1,2],[3]", "[1,2],[3,4,", "[1,2,3]", '["a",1]', "[]", "[1e9,2]", "[,]"])
def test_outlines_that_are_none_are_refused_by_the_name_of_their_file(tmp_path, broken):
    write_geojson(tmp_path / "odd.geojson", [squares(1, Size(50, 50))], 0.5)
    whole = (tmp_path / "odd.geojson").read_text()
    first = whole.index("[[[") + 2
    (tmp_path / "odd.geojson").write_text(whole[:first] + broken + "]]}}\n]}\n")
    with pytest.raises(FileFormatError, match=r"odd\.geojson"):
        read_outlines(tmp_path / "odd.geojson", Size(50, 50))


def test_damaged_and_empty_files_of_nuclei(tmp_path):
    size = Size(100, 100)
    write_geojson(tmp_path / "none.geojson", [], 0.5)
    empty = read_outlines(tmp_path / "none.geojson", size)
    assert (len(empty), empty.about()["cells"]) == (0, {})
    assert Image.open(io.BytesIO(empty.density())).mode == "RGBA"
    write_geojson(tmp_path / "cut.geojson", [squares(3, size)], 0.5)
    whole = (tmp_path / "cut.geojson").read_text()
    (tmp_path / "cut.geojson").write_text(whole[: len(whole) - 300])
    (tmp_path / "odd.parquet").write_text("no")
    (tmp_path / "odd.geojson.gz").write_bytes(b"\x1f\x8b12")
    for name in ("cut.geojson", "odd.parquet", "odd.geojson.gz"):
        with pytest.raises(FileFormatError, match=name.split(".")[0]):
            read_outlines(tmp_path / name, size)
