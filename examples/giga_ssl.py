"""Slides in, a vector a slide out, and what it knows of your labels: python giga_ssl.py SLIDES LABELS.csv

Without arguments 16 slides are painted first, whose classes are known. No label is used before the last step.
"""

import sys

import histossl as hs


def main(slides, labels, epochs=100):
    """The scores of a linear model on the vectors, on patients that it has not seen."""
    # 1. Find the tissue, lay tiles of 64 µm, and turn them into features: once plainly and as four augmented views. A
    #    random network stands for the foundation model of your choice: "timm:NAME", "hf:NAME".
    features = hs.encode(slides, "random", hs.TileSpec(px=64, mpp=1.0), views=4, tiles=64)
    # 2. The slide encoder learns to tell two views of a slide from views of the others.
    encoder = hs.pretrain(features, epochs=epochs)
    # 3. One vector a slide, as AnnData.
    vectors = hs.embed(features, encoder)
    print(vectors)
    print(hs.search(vectors, vectors.obs_names[0], top=3))
    # 4. Labels are read here for the first time; the slides of a patient are never both in training and in test.
    result = hs.probe(vectors, labels, folds=2, shots=())
    print(result)
    return result


if __name__ == "__main__":
    if len(sys.argv) == 3:
        main(*sys.argv[1:])
    else:
        hs.write_cohort("out/example/cohort", slides=16, width=768, height=896)
        main("out/example/cohort/slides", "out/example/cohort/labels.csv")
