"""DICOM: the same pixels and mpp as OpenSlide reads, also in encodings that OpenSlide refuses."""

from __future__ import annotations

from pathlib import Path

import imagecodecs
import numpy as np
import pytest

from histossl.core.errors import SlideError
from histossl.wsi import readers
from histossl.wsi.folders import look_for_slides
from histossl.wsi.geometry import Region
from histossl.wsi.slide import open_slide
from histossl.wsi.synth import SynthSettings, paint_region

pytest.importorskip("wsidicom")
pydicom = pytest.importorskip("pydicom")
WIDTH, HEIGHT, TILE, MPP = 700, 500, 128, 0.5
JPEG, HTJ2K, DEFLATED = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.1.99"
ENCODE = {
    JPEG: lambda tile: imagecodecs.jpeg8_encode(tile, level=95),
    HTJ2K: lambda tile: imagecodecs.htj2k_encode(tile, reversible=True),
}


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return paint_region(SynthSettings(WIDTH, HEIGHT, seed=4), Region(0, 0, WIDTH, HEIGHT))


def write(path: Path, rgb: np.ndarray, syntax: str = JPEG, series: str = "1.2.3.4", step: int = 1) -> Path:
    """One level of a whole-slide image, tiled in full."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate

    height, width = rgb.shape[:2]
    rows, columns = -(-height // TILE), -(-width // TILE)
    padded = np.pad(rgb, ((0, rows * TILE - height), (0, columns * TILE - width), (0, 0)), mode="edge")
    tiles = padded.reshape(rows, TILE, columns, TILE, 3).transpose(0, 2, 1, 3, 4).reshape(-1, TILE, TILE, 3)
    ds, meta = Dataset(), FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    ds.SOPClassUID = meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.77.1.6"
    ds.SOPInstanceUID = meta.MediaStorageSOPInstanceUID = f"{series}.{step}"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = "1.2.3", series, f"{series}.9"
    ds.Modality, ds.ImageType = "SM", ["ORIGINAL" if step == 1 else "DERIVED", "PRIMARY", "VOLUME", "NONE"]
    ds.PatientID = ds.PatientName = ds.PatientBirthDate = ds.PatientSex = ds.StudyDate = ds.StudyTime = ""
    ds.ContainerIdentifier = "a"
    ds.Rows = ds.Columns = TILE
    ds.TotalPixelMatrixRows, ds.TotalPixelMatrixColumns, ds.NumberOfFrames = height, width, len(tiles)
    ds.TotalPixelMatrixFocalPlanes, ds.NumberOfOpticalPaths = 1, 1
    ds.ImagedVolumeWidth, ds.ImagedVolumeHeight, ds.ImagedVolumeDepth = (
        width * MPP * step / 1e3,
        height * MPP * step / 1e3,
        0.001,
    )
    ds.DimensionOrganizationType = "TILED_FULL"
    ds.SamplesPerPixel, ds.PlanarConfiguration, ds.BitsAllocated, ds.BitsStored, ds.HighBit = 3, 0, 8, 8, 7
    ds.PixelRepresentation = 0
    ds.PhotometricInterpretation = "YBR_FULL_422" if syntax == JPEG else "RGB"
    ds.BurnedInAnnotation, ds.LossyImageCompression, ds.VolumetricProperties = "NO", "00", "VOLUME"
    ds.FocusMethod, ds.ExtendedDepthOfField, ds.ImageOrientationSlide = "AUTO", "NO", [0, -1, 0, -1, 0, 0]
    ds.AcquisitionDateTime, ds.InstanceNumber, ds.SpecimenLabelInImage = "20200101000000", step, "NO"
    measures, origin, optics, functions = Dataset(), Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [MPP * step / 1e3] * 2, 0.001
    functions.PixelMeasuresSequence = [measures]
    origin.XOffsetInSlideCoordinateSystem = origin.YOffsetInSlideCoordinateSystem = 0
    optics.OpticalPathIdentifier, optics.ObjectiveLensPower = "1", 20
    ds.SharedFunctionalGroupsSequence, ds.TotalPixelMatrixOriginSequence = [functions], [origin]
    ds.OpticalPathSequence = [optics]
    ds.PixelData = encapsulate([bytes(ENCODE[syntax](np.ascontiguousarray(tile))) for tile in tiles])
    ds.file_meta = meta
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path


def test_the_same_as_openslide(tmp_path, picture, monkeypatch):
    half = picture.reshape(HEIGHT // 2, 2, WIDTH // 2, 2, 3).mean((1, 3)).astype(np.uint8)
    path = write(tmp_path / "a.dcm", picture)
    write(tmp_path / "b.dcm", half, step=2)
    write(tmp_path / "other.dcm", half, series="1.2.3.5")
    with open_slide(path) as ours:
        assert isinstance(ours._reader, readers.DicomReader)
        monkeypatch.delitem(readers.READERS, "wsidicom")
        with open_slide(path) as other:
            assert isinstance(other._reader, readers.OpenSlideReader)
            assert ours.levels == other.levels
            assert (ours.mpp, ours.objective, ours.vendor) == (other.mpp, other.objective, other.vendor)
            for region, mpp in ((Region(101, 57, 300, 211), MPP), (Region(-20, 300, 500, 300), 1.3)):
                np.testing.assert_array_equal(ours.read(region, mpp), other.read(region, mpp))
    assert len(look_for_slides(tmp_path).slides) == 2


def test_what_openslide_refuses_is_read(tmp_path, picture, monkeypatch):
    path = write(tmp_path / "a.dcm", picture, HTJ2K)
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read(Region(0, 0, WIDTH, HEIGHT), MPP), picture)
    monkeypatch.delitem(readers.READERS, "wsidicom")
    with pytest.raises(SlideError, match="transfer syntax"):
        open_slide(path)


def test_damaged_files_are_refused_by_name(tmp_path, picture):
    path = write(tmp_path / "a.dcm", picture)
    data = path.read_bytes()
    for length in (140, 400, len(data) // 2):
        path.write_bytes(data[:length])
        with pytest.raises(SlideError, match=r"a\.dcm"), open_slide(path) as slide:
            slide.read(Region(0, 0, WIDTH, HEIGHT), MPP)
