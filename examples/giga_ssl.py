"""Slides in, a vector a slide out, and a linear probe of it: python giga_ssl.py SLIDES LABELS.csv STUDY

Without arguments 16 slides are painted first, whose classes are known. No label is seen before the last step.
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict

from histossl.core.embeddings import read_embeddings
from histossl.encoders.encode import EncodeSettings, encode_slides
from histossl.encoders.tile_encoder import load_encoder
from histossl.evaluate.labels import read_labels
from histossl.evaluate.search import nearest
from histossl.execution.workers import SerialExecutor, Workers
from histossl.gigassl.embed import EmbedSettings
from histossl.gigassl.pretrain_settings import PretrainSettings
from histossl.study.embed_stage import embed_study
from histossl.study.encode_stage import encode_study
from histossl.study.folder import Study
from histossl.study.inspect_stage import inspect_slides
from histossl.study.pretrain_stage import pretrain_study
from histossl.view.report.study_report import report_study
from histossl.wsi.synth import write_cohort
from histossl.wsi.tiles import TileSpec
from histossl.wsi.tissue import TissueSettings


def main(slides: Path, labels: Path, out: Path, epochs: int = 100) -> dict[str, float]:
    """Target -> accuracy of a logistic regression on the vectors, over patients that it has not seen."""
    study = Study(out)
    with study.lock(), Workers(1) as workers:
        # 1. Where the tissue is, and tiles of 64 µm on it. Slides that fail are left out; slides.csv says why.
        inspect_slides(study, slides, None, TissueSettings(), TileSpec(px=64, mpp=1.0), workers)
        # 2. Tiles to features. A random network stands for the foundation model of your choice: "timm:NAME", "hf:NAME".
        encoder = load_encoder("random")
        views = EncodeSettings(views=4, tiles=64)
        encode_study(study, encoder, views, lambda jobs: encode_slides(jobs, encoder, views, workers))
        # 3. The slide encoder learns to tell two augmented views of a slide from views of the others.
        pretrain_study(study, PretrainSettings(epochs=epochs), "auto")
        # 4. One vector a slide.
        embed_study(study, EmbedSettings(), "auto", SerialExecutor())
        report_study(study)

    found = read_embeddings(study.embeddings)
    ids, x = list(found.slides.index), found.vectors["giga-ssl"]
    table = read_labels(labels, ids)
    patients = table.table["patient_id"].reindex(ids).to_numpy(str)
    print(f"{len(ids)} slides of {len(set(patients))} patients, {x.shape[1]} numbers each")
    print("most like", ids[0], "is", ids[nearest(x, patients, 0, 1)[0].row])

    # 5. Labels enter here for the first time; the slides of a patient are never on both sides.
    scores = {}
    for target in table.targets:
        y = table.table[target].reindex(ids).to_numpy(str)
        model = LogisticRegression(C=10, class_weight="balanced", max_iter=1000)
        guessed = cross_val_predict(model, x, y, groups=patients, cv=GroupKFold(4))
        scores[target] = float(np.mean(guessed == y))
        print(f"{target}: {scores[target]:.0%} right")
    return scores


if __name__ == "__main__":
    if len(sys.argv) == 4:
        main(*map(Path, sys.argv[1:]))
    else:
        write_cohort("out/example/cohort", slides=16, width=768, height=896)
        cohort = Path("out/example/cohort")
        main(cohort / "slides", cohort / "labels.csv", Path("out/example/study"))
