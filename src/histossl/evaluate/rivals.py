"""What the first embedding has to beat, on the same labels and folds: other poolings, neighbours, trained networks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from histossl.errors import FileFormatError, SettingsError
from histossl.evaluate.labels import Labels
from histossl.evaluate.probe import ProbeResult, ProbeSettings, Rival, probe
from histossl.evaluate.sources import Source
from histossl.store import read_features

NEIGHBOURS = 10
POOLED = {"deviation": "mean and deviation", "max": "max pooling"}
TRAINED = {"attention": "attention MIL", "sparse": "SparseConvMIL", "finetune": "fine-tuned encoder"}


def judge(source: Source, labels: Labels, settings: ProbeSettings) -> ProbeResult:
    """Probe the vectors of a source beside the rivals that `settings.rivals` names.

    - `knn`: the 10 nearest labelled slides by the first vectors, cosine of standardised features, weighted by distance;
    - `deviation`, `max`: logistic regression on mean and standard deviation, or on the maximum, of the tiles' features;
    - `attention`, `sparse`, `finetune`: networks trained on the labels, see `histossl.evaluate.mil`.

    Raises:
        SettingsError: the features of the tiles, or the pretrained encoder, are not there.
        LabelError, FileFormatError: see `probe`.
    """
    wanted = tuple(dict.fromkeys(settings.rivals))
    needing = [name for name in wanted if name in (*POOLED, *TRAINED)]
    lost = [name for name in source.ids if name not in source.tiles] if needing else []
    if lost:
        what = f"{', '.join(needing)} need features of tiles, and {len(lost)} slides have none, first {lost[0]!r}"
        raise SettingsError(f"probe.rivals: {what}", "probe the folder of the study that encoded them")
    vectors: dict[str, NDArray[np.float32]] = dict(source.vectors)
    if pooled := [name for name in wanted if name in POOLED]:
        vectors |= _pooled(source, pooled)
    rivals: dict[str, Rival] = {}
    if "knn" in wanted:
        first = next(iter(source.vectors))
        rivals[f"{first}, {NEIGHBOURS} nearest"] = neighbours(source.vectors[first])
    trained = [name for name in wanted if name in TRAINED]
    if trained:
        from histossl.evaluate.mil import read_bags, trained_rival

        if "finetune" in trained and source.encoder is None:
            raise SettingsError("probe.rivals: finetune needs a pretrained slide encoder", "probe a study that has one")
        bags = read_bags([source.tiles[name] for name in source.ids])
        rivals |= {TRAINED[name]: trained_rival(name, bags, source.encoder) for name in trained}
    return probe(vectors, source.ids, labels, settings, rivals)


def neighbours(values: NDArray) -> Rival:
    """Classes by the vote of the nearest labelled slides.

    Args:
        values: (N, d), a row a slide.
    """

    def predict(train: NDArray, classes: NDArray, test: NDArray, seed: int) -> NDArray[np.float64]:
        scaler = StandardScaler().fit(values[train])
        model = KNeighborsClassifier(min(NEIGHBOURS, len(train)), weights="distance", metric="cosine")
        return model.fit(scaler.transform(values[train]), classes).predict_proba(scaler.transform(values[test]))

    return predict


def _pooled(source: Source, wanted: list[str]) -> Mapping[str, NDArray[np.float32]]:
    rows: dict[str, list[NDArray[np.float32]]] = {name: [] for name in wanted}
    for slide in source.ids:
        features = read_features(source.tiles[slide])
        for name, found in rows.items():
            both = (features.mean(axis=0), features.std(axis=0))
            found.append(features.max(axis=0) if name == "max" else np.concatenate(both))
    try:
        return {POOLED[name]: np.stack(values) for name, values in rows.items()}
    except ValueError as error:
        raise FileFormatError("slides have features of different lengths", "encode all with one encoder") from error
