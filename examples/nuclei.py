"""Nuclei of a picture or slide, learned on it without labels: python nuclei.py SLIDE OUT [MPP]

Without arguments a slide is painted whose nuclei are known, and what was found is scored against them.
"""

import sys

import histossl as hs
from histossl.nuclei import export, metrics


def main(path, out, mpp=None, steps=400):
    """The nuclei; writes them for QuPath, and a picture of them, into the folder `out`."""
    with hs.open_slide(path, mpp) as slide:
        # 1. A network of 42 thousand weights learns here and now. "prior" is a threshold that learns nothing.
        segmenter = hs.NucleiSegmenter().fit([slide], steps=steps) if steps else hs.NucleiSegmenter.load("prior")
        # 2. Outlines in pixels of the slide, and measures.
        nuclei = segmenter.segment(slide)
        print(nuclei)
        print(nuclei.to_frame().describe().round(2))
        # 3. For other tools.
        hs.write_nuclei(nuclei, f"{out}/nuclei.geojson", slide.mpp)
        nuclei.plot(slide.plot()).figure.savefig(f"{out}/nuclei.png", dpi=200)
        return export.label_image(nuclei, slide.size), slide.size


if __name__ == "__main__":
    if len(sys.argv) > 2:
        main(*sys.argv[1:3], mpp=float(sys.argv[3]) if len(sys.argv) > 3 else None)
    else:
        hs.write_cohort("out/example/nuclei", slides=1, width=512, height=512, mpp=0.5, truth=True)
        found, size = main("out/example/nuclei/slides/slide-001.tiff", "out/example/nuclei")
        truth = hs.read_nuclei("out/example/nuclei/truth/slide-001.geojson")
        print(metrics.score(found, export.label_image(truth, size)))
