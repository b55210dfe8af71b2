"""Paints hematoxylin-and-eosin slides whose nuclei, tissue and classes are known, of any size, in constant memory."""

from histossl.wsi.synth.artefacts import PAINTED, Artefact, artefacts_of, draw_artefacts, paint_artefacts
from histossl.wsi.synth.cohort import synth, write_cohort
from histossl.wsi.synth.recipe import CLASSES, FACTORS, KINDS, NUCLEI, SynthSettings
from histossl.wsi.synth.write import (
    nuclei_in,
    paint_region,
    write_slide,
    write_truth,
)

__all__ = [
    "CLASSES",
    "FACTORS",
    "KINDS",
    "NUCLEI",
    "PAINTED",
    "Artefact",
    "SynthSettings",
    "artefacts_of",
    "draw_artefacts",
    "nuclei_in",
    "paint_artefacts",
    "paint_region",
    "synth",
    "write_cohort",
    "write_slide",
    "write_truth",
]
