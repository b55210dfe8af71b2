"""Slides with flipped bits, cut ends and mad headers: each ends as a result or as an error that names it."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from histossl.core import hdf5
from histossl.core.errors import SlideError
from histossl.execution.workers import Workers
from histossl.wsi import tile_files
from histossl.wsi.geometry import Region
from histossl.wsi.slide import open_slide
from histossl.wsi.synth import SynthSettings, write_slide

MEMORY = 4 * 2**30
SECONDS = 120.0


def mutant(data: bytes, rng: np.random.Generator) -> bytes:
    """A slide's file, damaged in one of four ways."""
    out = bytearray(data)
    way = rng.integers(4)
    if way == 0:  # a few bits anywhere
        for at in rng.integers(0, len(out), rng.integers(1, 200)):
            out[at] ^= 1 << int(rng.integers(8))
    elif way == 1:  # cut short
        del out[int(rng.integers(0, len(out))) :]
    elif way == 2:  # the header, and the directory that it points to
        places = [*range(16), *_directory(data)]
        for at in rng.choice(places, rng.integers(1, 12)):
            out[int(at)] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))]))
    else:  # a stretch of another place
        length = int(rng.integers(1, 65536))
        source, target = rng.integers(0, max(1, len(out) - length), 2)
        out[target : target + length] = out[source : source + length]
    return bytes(out)


def _directory(data: bytes) -> range:
    order = "<" if data[:2] == b"II" else ">"
    (start,) = struct.unpack_from(
        order + ("Q" if data[2:4] in (b"+\0", b"\0+") else "I"), data, 8 if b"+" in data[2:4] else 4
    )
    return range(start, min(len(data), start + 400)) if start < len(data) else range(16)


def visit(task: tuple[Path, int, Path]) -> str:
    """Damage a slide, open it, look at it as a run does: at all of it and at some places."""
    source, seed, folder = task
    rng = np.random.default_rng([seed, 7])
    path = folder / f"{seed}{source.suffix}"
    path.write_bytes(mutant(source.read_bytes(), rng))
    try:
        with open_slide(path, mpp_default=0.5) as slide:
            assert slide.thumbnail(256).dtype == np.uint8
            for _ in range(3):
                x, y = rng.uniform(0, slide.size.width), rng.uniform(0, slide.size.height)
                assert slide.read(Region(x, y, 448.0, 448.0), slide.mpp * 2).shape == (224, 224, 3)
        return "read"
    except SlideError as error:
        told = str(error)
    finally:
        path.unlink()
    return "refused" if path.name in told and "\n" not in told else told


def fuzz(slides: list[Path], count: int, folder: Path) -> dict[str, int]:
    tasks = [(slides[k % len(slides)], k, folder) for k in range(count)]
    tally: dict[str, int] = {}
    with Workers(timeout=SECONDS, memory=MEMORY) as workers:
        for (slide, seed, _), answer in workers.map(visit, tasks):
            # A crash in native code, a hang or too much memory is a record, too; a bug of ours is another exception.
            kind = answer if isinstance(answer, str) else type(answer).__name__
            assert kind in ("read", "refused", "WorkerDied", "WorkerHung", "MemoryError"), (slide.name, seed, answer)
            tally[kind] = tally.get(kind, 0) + 1
    assert sum(tally.values()) == count
    return tally


def smallest(data_dir: Path) -> list[Path]:
    return sorted((data_dir / "slides").iterdir(), key=lambda path: path.stat().st_size)


def test_damaged_slides_end_as_results_or_errors(data_dir, tmp_path):
    tally = fuzz(smallest(data_dir)[:4], 40, tmp_path)
    assert tally.get("refused", 0) > 5
    assert tally.get("read", 0) > 0


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_two_thousand_damaged_slides_end_as_results_or_errors(data_dir, tmp_path):
    fuzz(smallest(data_dir), 2000, tmp_path)


def refused(path: Path) -> str:
    with Workers(1, timeout=SECONDS, memory=MEMORY) as workers:
        [(_, answer)] = workers.map(look, [path])
    assert isinstance(answer, SlideError | MemoryError), answer
    return str(answer)


def look(path: Path) -> int:
    with open_slide(path, mpp_default=0.5) as slide:
        return int(slide.thumbnail(64).sum())


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_bombs_are_refused_before_they_go_off(tmp_path):
    """Small files that would be large pictures: 60,000 x 60,000 pixels in some kB, and a header of 2^31 x 2^31."""
    png = tmp_path / "bomb.png"
    rows = zlib.compress(bytes(10**6), 9)
    for side in (60_000, 2**31 - 1):
        head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        png.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
        assert "bomb.png" in refused(png)


def test_a_tile_that_says_it_is_huge_is_refused(tmp_path):
    path = tmp_path / "huge.tif"
    tifffile.imwrite(path, np.zeros((256, 256, 3), np.uint8), tile=(256, 256), compression="zlib", photometric="rgb")
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for tag in ("ImageWidth", "ImageLength", "TileWidth", "TileLength"):
            tiff.pages[0].tags[tag].overwrite(900_000)
    assert "its tiles have 900000 x 900000 pixels" in refused(path)


def test_directories_that_lead_back_to_themselves_come_to_an_end(tmp_path):
    path = tmp_path / "loop.tif"
    tifffile.imwrite(path, np.zeros((64, 64, 3), np.uint8), tile=(64, 64), photometric="rgb", metadata=None)
    data = bytearray(path.read_bytes())
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    struct.pack_into("<I", data, start + 2 + 12 * count, start)
    path.write_bytes(data)
    with Workers(1, timeout=SECONDS, memory=MEMORY) as workers:
        [(_, answer)] = workers.map(look, [path])
    assert isinstance(answer, int | SlideError), answer


@pytest.mark.slow
def test_tiles_that_cannot_be_decoded_are_left_out_up_to_a_share(tmp_path):
    """Against the same slide undamaged: the tiles that stand have the same features, at the same places."""
    from histossl.encoders.encode import EncodeJob, EncodeSettings
    from histossl.encoders.encode_slides import encode_slides
    from histossl.encoders.tile_encoder import load_encoder
    from histossl.study.survey import SurveyJob, survey_slide
    from histossl.wsi.tiles import TileSpec
    from histossl.wsi.tissue import TissueSettings

    path, spec = tmp_path / "s.tiff", TileSpec(px=32, mpp=1.0)
    write_slide(path, SynthSettings(width=1536, height=1280, mpp=0.5))
    survey = survey_slide(
        SurveyJob("s", path, None, None, TissueSettings(), spec, tmp_path / "t.h5", tmp_path / "q.jpg")
    )
    encoder = load_encoder("random", precision="float32")

    def encoded(name: str, share: float):
        job = EncodeJob("s", path, survey.mpp, spec, tmp_path / "t.h5", tmp_path / f"{name}.h5", tmp_path / name)
        settings = EncodeSettings(views=2, tiles=8, batch=16, precision="float32", max_lost=share)
        with Workers(1) as workers:
            return list(encode_slides([job], encoder, settings, workers))

    before = path.stat()
    assert encoded("whole", 0.9)[-1].finished
    with tifffile.TiffFile(path) as tiff:
        pages = [p for page in tiff.pages for p in (page, *(page.pages or ()))]
        tiles = [(p.dataoffsets[len(p.dataoffsets) // 2], p.databytecounts[len(p.dataoffsets) // 2]) for p in pages]
    with path.open("r+b") as file:
        for start, length in tiles:
            file.seek(start)
            file.write(bytes(length))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # silent damage: neither size nor time tell

    steps = encoded("damaged", 0.9)
    last = steps[-1]
    assert last.finished
    whole, rest = tile_files.read_tiles_of(tmp_path / "whole.h5"), tile_files.read_tiles_of(tmp_path / "damaged.h5")
    assert 0 < last.lost < len(whole.xy)
    assert "cannot be read" in last.why
    assert len(rest.xy) == len(whole.xy) - last.lost
    places = {tuple(xy): k for k, xy in enumerate(whole.xy)}
    kept = [places[tuple(xy)] for xy in rest.xy]
    one, other = (hdf5.read_features(tmp_path / f"{name}.h5") for name in ("whole", "damaged"))
    np.testing.assert_allclose(other, one[kept], rtol=1e-4, atol=1e-4)
    coords = np.load(tmp_path / "damaged" / "coords.npy")
    assert {tuple(xy) for view in coords for xy in view} <= {tuple(xy) for xy in rest.xy}

    steps = encoded("strict", 0.0)
    assert "tiles cannot be decoded: " in str(steps[-1].error)
    assert not (tmp_path / "strict.h5").exists()
    assert not (tmp_path / "strict").exists()


def test_a_picture_cut_in_the_middle_names_itself(tmp_path):
    path = tmp_path / "cut.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 400, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:5000])
    assert "cut.jpg" in refused(path)
