"""Feature files and view folders whose truth is known."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from histossl.core import atomic, fingerprints
from histossl.gigassl.encoder_settings import EncoderSettings
from histossl.gigassl.pretrain_settings import PretrainSettings
from histossl.gigassl.slide_sources import SlideSource
from histossl.gigassl.views import ViewSettings

IJ = np.stack(np.divmod(np.arange(40), 8), axis=1)  # 5 rows of 8


FAST = ["--pretrain.epochs=2", "--pretrain.view.tiles=16", "--pretrain.encoder.dim=8", "--device=cpu"]
FAST += ["--pretrain.encoder.prototypes=0"]


def features(name: str, dim: int = 24, tiles: int = 40) -> np.ndarray:
    rng = np.random.default_rng(sum(name.encode()))
    return (rng.normal(size=dim) + rng.normal(size=(tiles, dim))).astype(np.float32)


def write_h5(path: Path, values: np.ndarray, xy: np.ndarray | None, about: dict, top: dict, key: str = "features"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file[key] = values
        if xy is not None:
            file["coords"] = xy
            file["coords"].attrs.update(about)
        file.attrs.update(top)


def trident(folder: Path, name: str, values: np.ndarray | None = None, xy: np.ndarray | None = None, **changes):
    """256 px at 20x on a slide of 0.25 µm: 512 level-0 pixels; the corner of the tissue at (300, 812)."""
    values = features(name) if values is None else values
    about = {"patch_size": 256, "patch_size_level0": 512, "level0_width": 9000, "level0_height": 7000, "overlap": 0}
    about |= {"level0_magnification": 40, "target_magnification": 20, "name": name} | changes
    about = {key: value for key, value in about.items() if value is not None}
    corner = IJ[:, ::-1] * 512 + [300, 812] if xy is None else xy
    write_h5(folder / f"{name}.h5", values, corner.astype(np.int64), about, {})


SMALL = PretrainSettings(
    epochs=30, batch=12, precision="float32", view=ViewSettings(tiles=24), encoder=EncoderSettings()
)


def write_source(folder: Path, name: str, rng: np.random.Generator, dim: int = 32, views: int = 4) -> SlideSource:
    """A slide of 60 tiles with its own mixture of features, and views that are shifted by noise of their own."""
    ij = np.stack(np.divmod(np.arange(60), 10), axis=1)
    xy = (ij[:, ::-1] * 512).astype(np.int64)
    centre = rng.normal(size=dim)
    features = (centre + 0.5 * rng.normal(size=(60, dim))).astype(np.float32)
    path = folder / f"{name}.h5"
    with h5py.File(path, "w") as file:
        file["features"] = features
        file["coords"] = xy
        file["coords"].attrs.update(
            patch_size=224, patch_size_level0=512, level0_width=5120, level0_height=3072, overlap=0
        )
    if views:
        with atomic.whole_folder(folder / name) as part:
            shifted = features + 0.3 * rng.normal(size=(views, 1, dim)) + 0.1 * rng.normal(size=(views, 60, dim))
            np.save(part / "features.npy", shifted.astype(np.float16))
            np.save(part / "coords.npy", np.repeat(xy[None], views, 0).astype(np.int32))
            fingerprints.write_made(part, "x", stride_level0=512.0)
    return SlideSource(name, path, folder / name)
