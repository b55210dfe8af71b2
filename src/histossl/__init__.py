"""Learning from histopathology slides without labels.

`import histossl as hs` is quick: each name below is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

TYPE_CHECKING = False  # type checkers take it for true by its name; to import typing would take most of the time
if TYPE_CHECKING:
    from typing import Any

    from histossl.core.errors import HistosslError as HistosslError
    from histossl.core.interchange import TileFeatures as TileFeatures
    from histossl.encoders.tile_encoder import load_encoder as load_encoder
    from histossl.evaluate.in_memory import patient_folds as patient_folds
    from histossl.evaluate.in_memory import patient_vectors as patient_vectors
    from histossl.evaluate.in_memory import predict as predict
    from histossl.evaluate.in_memory import probe as probe
    from histossl.evaluate.in_memory import read_embeddings as read_embeddings
    from histossl.evaluate.in_memory import search as search
    from histossl.gigassl.encoder import SlideEncoder as SlideEncoder
    from histossl.nuclei.nuclei_files import read_nuclei as read_nuclei
    from histossl.nuclei.nuclei_files import write_nuclei as write_nuclei
    from histossl.nuclei.segmenter import NucleiSegmenter as NucleiSegmenter
    from histossl.study.folder import Study as Study
    from histossl.study.slide_vectors import embed as embed
    from histossl.study.slide_vectors import pretrain as pretrain
    from histossl.study.tile_features import encode as encode
    from histossl.study.tile_features import pretrain_tiles as pretrain_tiles
    from histossl.study.tile_features import read_features as read_features
    from histossl.wsi.array_slide import picture_slide as picture_slide
    from histossl.wsi.slide import find_slides as find_slides
    from histossl.wsi.slide import open_slide as open_slide
    from histossl.wsi.synth.cohort import write_cohort as write_cohort
    from histossl.wsi.tiles import TileSpec as TileSpec
    from histossl.wsi.tiles import tile_grid as tile_grid
    from histossl.wsi.tissue import find_tissue as find_tissue

# In the order of the work. The block above says the same to type checkers; a test compares the two.
_MODULES = {
    "find_slides": "wsi.slide",
    "open_slide": "wsi.slide",
    "picture_slide": "wsi.array_slide",
    "find_tissue": "wsi.tissue",
    "TileSpec": "wsi.tiles",
    "tile_grid": "wsi.tiles",
    "load_encoder": "encoders.tile_encoder",
    "pretrain_tiles": "study.tile_features",
    "encode": "study.tile_features",
    "read_features": "study.tile_features",
    "TileFeatures": "core.interchange",
    "pretrain": "study.slide_vectors",
    "SlideEncoder": "gigassl.encoder",
    "embed": "study.slide_vectors",
    "read_embeddings": "evaluate.in_memory",
    "patient_vectors": "evaluate.in_memory",
    "probe": "evaluate.in_memory",
    "predict": "evaluate.in_memory",
    "search": "evaluate.in_memory",
    "patient_folds": "evaluate.in_memory",
    "NucleiSegmenter": "nuclei.segmenter",
    "read_nuclei": "nuclei.nuclei_files",
    "write_nuclei": "nuclei.nuclei_files",
    "Study": "study.folder",
    "write_cohort": "wsi.synth.cohort",
    "HistosslError": "core.errors",
}

__all__ = [*_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'histossl' has no attribute {name!r}")
    found = getattr(import_module(f"histossl.{_MODULES[name]}"), name)
    globals()[name] = found  # the next use does not come here
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
