"""Nuclei of a picture, learned on that very picture without labels: python nuclei.py IMAGE.png MPP OUT

Without arguments a field is painted whose nuclei are known, and what was found is scored against them.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from histossl.nuclei.export import label_image, write_geojson, write_overlay, write_parquet
from histossl.nuclei.instances import MEASURES
from histossl.nuclei.metrics import score
from histossl.nuclei.pseudo_labels import SelfTrainingSettings
from histossl.nuclei.segmenter import NucleiSegmenter
from histossl.nuclei.stain_survey import SegmentSettings, survey
from histossl.nuclei.tiled_inference import segment_slide
from histossl.wsi.array_slide import picture_slide
from histossl.wsi.geometry import Region
from histossl.wsi.synth import SynthSettings, nuclei_in, paint_region


def main(image: np.ndarray, mpp: float, out: Path, steps: int = 400) -> np.ndarray:
    """The label image: (H, W) int32, 0 = none. Writes GeoJSON for QuPath, GeoParquet and a picture into `out`."""
    out.mkdir(parents=True, exist_ok=True)

    # 1. A network of 42 thousand weights learns here and now; steps=0 would be the method without learning, below.
    segmenter = NucleiSegmenter(SelfTrainingSettings(steps=steps)) if steps else NucleiSegmenter.load("prior")
    if steps:
        segmenter.fit([image], mpp=mpp)

    # 2. Outlines and measures, a row a nucleus, in pixels of the picture. Of a slide: `open_slide` in place of this.
    slide, method = picture_slide(image, mpp), segmenter.method
    nuclei = segment_slide(slide, survey(slide, method.mpp), method, SegmentSettings())
    print(f"{len(nuclei)} nuclei, {np.median(nuclei.measures[:, MEASURES.index('area_um2')]):.0f} µm² in the median")

    # 3. For other tools. `histossl nuclei segment` does all of this with whole slides.
    write_geojson(out / "nuclei.geojson", [nuclei], mpp)
    write_parquet(out / "nuclei.parquet", [nuclei], mpp)
    write_overlay(out / "nuclei.jpg", slide, [nuclei])
    return label_image(nuclei, slide.size)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        picture = np.asarray(Image.open(sys.argv[1]).convert("RGB"))
        main(picture, float(sys.argv[2]), Path(sys.argv[3]))
    else:
        settings, region = SynthSettings(mpp=0.5, seed=1), Region(1000, 1000, 512, 512)
        picture, (truth, _) = paint_region(settings, region), nuclei_in(settings, region)
        found = main(picture, 0.5, Path("out/example/nuclei"))
        result = score(found, truth)
        print(f"Dice {result.dice:.2f}, AJI {result.aji:.2f}, PQ {result.pq:.2f} against the painted truth")
