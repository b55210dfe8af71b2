"""Feature files of strangers: nothing leads to other files, no size is believed, every error names its file."""

from __future__ import annotations

import csv
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
import torch

from histossl.cli import features_command
from histossl.cli.main import main
from histossl.core import hdf5
from histossl.core.embeddings import read_embeddings, write_embeddings
from histossl.core.errors import FileFormatError, SettingsError
from histossl.core.interchange import read_tile_features
from histossl.evaluate.sources import read_source
from support.fuzz import CORPUS

RNG = np.random.default_rng(0)
SECRET = b"0123456789abcdef" * 40
COUNT = 20
PLACES = np.stack([np.arange(COUNT) % 5, np.arange(COUNT) // 5], 1) * 448


def write(path: Path, change: Callable[[h5py.File, Path], None] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["features"] = RNG.normal(size=(COUNT, 8)).astype(np.float32)
        file["coords"] = PLACES
        about = {"patch_size": 224, "patch_size_level0": 448, "level0_width": 3000, "level0_height": 3000}
        file["coords"].attrs.update(about | {"overlap": 0, "mpp": 0.5, "target_magnification": 10})
        if change is not None:
            change(file, path)
    return path


def attribute(name: str, value: object) -> Callable[[h5py.File, Path], None]:
    def change(file: h5py.File, _: Path) -> None:
        file["coords"].attrs[name] = value

    return change


def replaced(make: Callable[[h5py.File, Path], object], name: str = "features") -> Callable[[h5py.File, Path], None]:
    def change(file: h5py.File, path: Path) -> None:
        del file[name]
        make(file, path)

    return change


def secret(path: Path) -> Path:
    place = path.parent.parent / "secret"
    place.write_bytes(SECRET)
    return place


def raw_storage(file: h5py.File, path: Path) -> None:
    file.create_dataset("features", (COUNT, 8), "f4", external=[(str(secret(path)), 0, COUNT * 8 * 4)])


def virtual(file: h5py.File, path: Path) -> None:
    other = write(path.parent.parent / "other" / "mine.h5")
    layout = h5py.VirtualLayout((COUNT, 8), "f4")
    layout[:] = h5py.VirtualSource(other, "features", (COUNT, 8))
    file.create_virtual_dataset("features", layout)


def external_link(file: h5py.File, path: Path) -> None:
    file["features"] = h5py.ExternalLink(str(write(path.parent.parent / "other" / "mine.h5")), "features")


def packed(file: h5py.File, _: Path) -> None:
    file.create_dataset("features", (2**20, 512), "f4", chunks=(2**14, 512), compression="gzip", fillvalue=0)
    file["features"][:2] = 1


LEADING = {"raw storage": raw_storage, "virtual": virtual, "external link": external_link}
TOO_LARGE = {
    "2^40 rows": lambda file, _: file.create_dataset("features", (2**40, 8), "f4", chunks=(256, 8)),
    "2^20 rows, none written": lambda file, _: file.create_dataset("features", (2**20, 512), "f4", chunks=(256, 512)),
    "a packed gigabyte": packed,
    "a chunk of 3 GiB": lambda file, _: file.create_dataset(
        "features", (2, 2**28), "f4", chunks=(2, 2**28), maxshape=(None, 2**28)
    ),
}
ODD = {
    **{f"{name} = {value}": attribute(name, value) for name in ("patch_size", "patch_size_level0", "mpp", "overlap",
        "level0_width") for value in (np.nan, "many", [1.0, 2.0], h5py.Empty("f4"), np.inf, 1j)},
    **{f"{name} = {value}": attribute(name, value) for name in ("patch_size", "patch_size_level0", "mpp")
        for value in (0, -1)},
    "overlap of all": attribute("overlap", 224),
    "a soft link": replaced(lambda file, _: file.__setitem__("features", h5py.SoftLink("/coords"))),
    "links in a circle": replaced(lambda file, _: file.__setitem__("features", h5py.SoftLink("/features"))),
    "a group": replaced(lambda file, _: file.create_group("features")),
    "complex": replaced(lambda file, _: file.create_dataset("features", data=np.ones((COUNT, 8), complex))),
    "text": replaced(lambda file, _: file.create_dataset("features", data=[["a"] * 8] * COUNT)),
    "records": replaced(lambda file, _: file.create_dataset("features", data=np.zeros(COUNT, "f4,f4"))),
    "nothing": replaced(lambda file, _: file.create_dataset("features", data=h5py.Empty("f4"))),
    "a scalar": replaced(lambda file, _: file.create_dataset("features", data=1.0)),
    "NaN": replaced(lambda file, _: file.create_dataset("features", data=np.full((COUNT, 8), np.nan))),
    "coords of NaN": replaced(lambda file, _: file.create_dataset("coords", data=np.full((COUNT, 2), np.nan)), "coords"),
    "coords far away": replaced(lambda file, _: file.create_dataset("coords", data=PLACES + 2**62), "coords"),
    "coords of a scalar": replaced(lambda file, _: file.create_dataset("coords", data=1), "coords"),
    "no coords": replaced(lambda file, _: None, "coords"),
}  # fmt: skip
BAD = {**{name: replaced(make) for name, make in {**LEADING, **TOO_LARGE}.items()}, **ODD}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_and_read_without_much_memory(tmp_path, name):
    path = write(tmp_path / "in" / "bad.h5", BAD[name])
    before = psutil.Process().memory_info().rss
    with pytest.raises(FileFormatError, match="bad") as caught:
        read_tile_features(path)
    assert psutil.Process().memory_info().rss - before < 2**28
    assert len(str(caught.value)) < 1000


def test_good_files_after_bad_ones_are_converted_and_nothing_of_others_is_in_the_output(tmp_path, capsys):
    for k, name in enumerate(BAD):
        write(tmp_path / "in" / f"bad{k:03d}.h5", BAD[name])
    for k in range(3):
        write(tmp_path / "in" / f"good{k}.h5")
    assert main(["features", "convert", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--to", "clam"]) == 1
    screen = capsys.readouterr().err
    assert screen.count("FAILED") == len(BAD)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["good0.h5", "good1.h5", "good2.h5"]


def test_pretrain_takes_the_good_files_only(tmp_path, capsys):
    bad = [*LEADING, "2^40 rows", "patch_size = 0", "mpp = nan", "complex", "links in a circle"]
    for k, name in enumerate(bad):
        write(tmp_path / "in" / f"bad{k}.h5", BAD[name])
    for k in range(3):
        write(tmp_path / "in" / f"good{k}.h5")
    out, flags = tmp_path / "study", ["--pretrain.epochs=1", "--pretrain.encoder.dim=16", "--device=cpu"]
    assert main(["pretrain", str(tmp_path / "in"), "--out", str(out), *flags]) == 1
    with (out / "slides.csv").open(newline="") as file:
        rows = {row["slide_id"]: row["status"] for row in csv.DictReader(file)}
    assert rows == {f"bad{k}": "failed" for k in range(len(bad))} | {f"good{k}": "encoded" for k in range(3)}
    assert sorted(path.name for path in (out / "features").iterdir()) == ["good0.h5", "good1.h5", "good2.h5"]
    assert "Traceback" not in capsys.readouterr().err
    # Its own features are links to the good files; made into more than that they are refused.
    own = out / "features" / "good0.h5"
    assert hdf5.read_features(own).shape == (COUNT, 8)
    write(tmp_path / "in" / "good0.h5", replaced(raw_storage))
    with pytest.raises(FileFormatError, match="other files"):
        hdf5.read_features(own)


TENSORS = {
    "stride 0": torch.zeros(1, 1).expand(2**26, 16),
    "overlapping": torch.zeros(2**10 + 63).as_strided((2**10, 64), (1, 1)),
    "meta": torch.zeros(20, 8, device="meta"),
    "complex": torch.zeros(20, 8, dtype=torch.complex64),
    "quantised": torch.quantize_per_tensor(torch.zeros(20, 8), 0.1, 0, torch.quint8),
    "sparse": torch.eye(8).to_sparse(),
    "bool": torch.zeros(20, 8, dtype=torch.bool),
    "flat": torch.zeros(20),
    "empty": torch.zeros(20, 0),
    "NaN": torch.full((20, 8), torch.nan),
    "a list": [torch.zeros(20, 8)],
}


@pytest.mark.parametrize("name", TENSORS)
def test_odd_tensors_are_refused_by_name(tmp_path, name):
    path = tmp_path / "bad.pt"
    torch.save(TENSORS[name], path)
    before = psutil.Process().memory_info().rss
    with pytest.raises(FileFormatError, match=r"bad\.pt"):
        read_tile_features(path)
    assert psutil.Process().memory_info().rss - before < 2**28


def test_tensors_that_require_grad_or_are_half_are_features(tmp_path):
    ones = torch.ones(20, 8)
    forms = (ones.clone().requires_grad_(), ones.bfloat16(), torch.nn.Parameter(ones), torch.ones(8, 20).T, ones[None])
    for k, tensor in enumerate(forms):
        torch.save(tensor, tmp_path / f"{k}.pt")
        np.testing.assert_array_equal(read_tile_features(tmp_path / f"{k}.pt").features, np.ones((20, 8), np.float32))


def test_archives_that_unpack_to_gigabytes_and_pickles_are_refused(tmp_path):
    torch.save(torch.zeros(2**22, 16), tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as old, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry), zipfile.ZIP_DEFLATED)
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(print))
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "empty.pt").touch()
    for name in ("bomb", "pickle", "folder", "empty"):
        with pytest.raises(FileFormatError, match=rf"{name}\.pt"):
            read_tile_features(tmp_path / f"{name}.pt")


@pytest.mark.parametrize("mpp", [0, -1, np.nan, np.inf])
def test_an_mpp_that_is_no_number_of_micrometres_is_refused(tmp_path, mpp):
    with pytest.raises(SettingsError, match="mpp"):
        read_tile_features(write(tmp_path / "a.h5"), mpp)


def circle(file: h5py.File) -> None:
    file["uns/again"] = file["uns"]


VECTORS = {
    "a hard link in a circle": circle,
    "a soft link in a circle": lambda file: file.__setitem__("uns/again", h5py.SoftLink("/uns")),
    "an external link": lambda file: file.__setitem__("uns/more", h5py.ExternalLink("other.h5", "/")),
    "2^40 rows": lambda file: file["obsm"].create_dataset("more", (2**40, 8), "f4", chunks=(256, 8)),
    "deep settings": lambda file: file["uns/histossl/settings"].write_direct(np.array("[" * 100_000, object)),
    "no settings": lambda file: file.__delitem__("uns/histossl/settings"),
    "no names": lambda file: file.__delitem__("obs"),
    "a kind that nobody knows": lambda file: file.attrs.__setitem__("encoding-type", "nothing"),
    "an element of such a kind": lambda file: file["obs"].attrs.__setitem__("encoding-type", "nothing"),
}


@pytest.mark.parametrize("name", VECTORS)
def test_odd_files_of_vectors_are_refused_by_name(tmp_path, name):
    rows = [
        {"slide_id": f"s{k}", "path": "", "mpp": "0.5", "width": "1", "height": "1", "tiles": "1"} for k in range(4)
    ]
    write_embeddings(tmp_path / "e.h5ad", rows, {"a": np.ones((4, 3)), "b": np.ones((4, 3))}, {"k": 1}, "made")
    assert len(read_embeddings(tmp_path / "e.h5ad").slides) == 4
    with h5py.File(tmp_path / "e.h5ad", "a") as file:
        VECTORS[name](file)
    with pytest.raises(FileFormatError, match=r"e\.h5ad"):
        read_embeddings(tmp_path / "e.h5ad")


def renamed(column: str, texts: list[str]) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file["obs"][column]
        made = file["obs"].create_dataset(column, data=texts)
        made.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})

    return change


def test_vectors_of_another_tool_are_refused_by_name_or_read(tmp_path):
    path = tmp_path / "study" / "v.h5ad"
    path.parent.mkdir()
    for change in (renamed("tiles", ["many", "x", "y"]), VECTORS["a kind that nobody knows"]):
        shutil.copyfile(CORPUS / "vectors-scanpy.h5ad", path)
        with h5py.File(path, "a") as file:
            change(file)
        if change is VECTORS["a kind that nobody knows"]:
            with pytest.raises(FileFormatError, match=r"v\.h5ad"):
                read_source(path)
        else:
            assert read_source(path).tile_counts == {}  # words are no counts


def test_names_of_slides_lead_to_no_pictures_outside_the_folder(tmp_path):
    path = tmp_path / "study" / "v.h5ad"
    (tmp_path / "study" / "qc").mkdir(parents=True)
    for name in ("study/qc/a.jpg", "mine.jpg", "study/qc/b\\b.jpg"):
        (tmp_path / name).touch()
    shutil.copyfile(CORPUS / "vectors-scanpy.h5ad", path)
    with h5py.File(path, "a") as file:
        renamed(str(file["obs"].attrs["_index"]), ["a", "../../mine", "b\\b"])(file)
    source = read_source(path)
    assert source.ids == ("a", "../../mine", "b\\b")
    assert source.pictures == {"a": tmp_path / "study" / "qc" / "a.jpg"}


@pytest.mark.slow  # as long as the time limit, which a busy machine must not reach with good files
def test_a_file_that_hangs_its_reader_costs_a_worker_and_not_the_command(tmp_path, capsys, monkeypatch):
    """One byte of a global heap is wrong, and HDF5 2.0 never comes back from the attribute that points there."""
    monkeypatch.setattr(features_command, "SLOWEST", 60.0)
    (tmp_path / "in").mkdir()
    shutil.copyfile(CORPUS.parent / "hangs" / "features.h5", tmp_path / "in" / "bad.h5")
    for name in ("a", "c"):
        write(tmp_path / "in" / f"{name}.h5")
    assert main(["features", "convert", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--to", "clam"]) == 1
    told = capsys.readouterr().err
    assert "FAILED" in told
    assert "bad.h5" in told
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.h5", "c.h5"]
