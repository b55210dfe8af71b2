"""HDF5 files that hang or kill the library: another process reads them first, and the command goes on."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest

import histossl as hs
from histossl.core import hdf5, trial
from histossl.core.embeddings import read_embeddings
from histossl.core.errors import FileFormatError
from histossl.core.fingerprints import fingerprint_of
from histossl.core.interchange import TileFeatures, read_tile_features
from histossl.evaluate.sources import read_source
from support.fuzz import CORPUS


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """The limit of time is short, and no process is left from before."""
    monkeypatch.setattr(trial, "SECONDS", 2.0)
    monkeypatch.setattr(trial, "_reader", None)


def tiles_of(path: Path) -> TileFeatures:
    return read_tile_features(path, in_um=True)


def hanging(name: str, path: Path) -> Path:
    """A file of the corpus whose heap of text has an object without length: HDF5 looks for its end for ever."""
    data = bytearray((CORPUS / name).read_bytes())
    at = data.find(b"GCOL")
    data[at + 16 : at + 18], data[at + 24 : at + 32] = bytes(2), bytes(8)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("vectors-scanpy.h5ad", read_source),
        ("whole-vectors.h5ad", read_embeddings),
        ("whole-vectors.h5ad", hs.read_embeddings),
        ("features-trident.h5", hs.read_features),
    ],
)
def test_a_file_that_hangs_its_reader_is_refused(tmp_path, name, read):
    path = hanging(name, tmp_path / name)
    with pytest.raises(FileFormatError, match=f"{path} hangs or kills"):
        read(path)
    shutil.copyfile(CORPUS / name, path)  # the same place, another state
    assert read(path) is not None


def test_a_file_that_took_a_byte_to_hang_is_one_without_a_fingerprint():
    assert fingerprint_of(CORPUS.parent / "hangs" / "features.h5") is None


def test_a_state_of_a_file_is_tried_once_and_a_killed_reader_begins_again(tmp_path, monkeypatch):
    path, asked = tmp_path / "a.h5", []
    shutil.copyfile(CORPUS / "features-plain.h5", path)
    answer = trial._answer
    monkeypatch.setattr(trial, "_answer", lambda *given: (asked.append(given[1]), answer(*given))[1])
    for _ in range(3):
        tiles_of(path)
    assert asked == [str(path)]
    assert trial._reader is not None
    reader = trial._reader[1]
    os.kill(reader.pid, signal.SIGSTOP)  # killed while it is asked
    shutil.copyfile(CORPUS / "features-plain.h5", tmp_path / "b.h5")
    os.kill(reader.pid, signal.SIGKILL)
    tiles_of(tmp_path / "b.h5")
    assert set(asked) == {str(path), str(tmp_path / "b.h5")}


def test_text_that_takes_more_memory_than_there_may_be_is_refused(tmp_path):
    path = tmp_path / "bomb.h5"
    with h5py.File(path, "w", libver="latest") as file:
        made = file.create_dataset("names", (1,), h5py.string_dtype(), data=["x" * 2**20])
        word = made.id.get_offset()
        file.create_dataset("many", (2**14,), h5py.string_dtype(), data=[""] * 2**14)
        at = file["many"].id.get_offset()
    data = bytearray(path.read_bytes())
    data[at : at + 16 * 2**14] = data[word : word + 16] * 2**14  # all of them the one long text
    path.write_bytes(data)
    before = psutil.Process().memory_info().rss
    with pytest.raises(FileFormatError, match=r"more memory|hangs or kills"):
        hdf5.check_tree(path)
    assert psutil.Process().memory_info().rss - before < 2**28


def test_files_with_odd_filters_groups_and_links_pass(tmp_path):
    path = tmp_path / "odd.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("scaled", data=np.arange(1000), scaleoffset=0, chunks=(100,))
        file["deep/er/x"] = 1.5
        file["again"] = h5py.SoftLink("/deep")
        file["out"] = h5py.ExternalLink("/etc/hostname", "/x")
        file["deep"]["circle"] = file["deep"]
        file.attrs["refers"] = file["deep"].ref
    with hdf5.open_h5(path) as file:
        assert len(file) == 4


def test_where_no_process_can_be_begun_files_are_read_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "_needed", True)
    monkeypatch.setattr(trial.sys, "executable", str(tmp_path / "none"))
    shutil.copyfile(CORPUS / "features-plain.h5", tmp_path / "a.h5")
    assert len(tiles_of(tmp_path / "a.h5").features)
    assert not trial._needed
