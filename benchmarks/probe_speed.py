"""How long the probe takes on 10,000 slides with 512 features and 1,000 bootstraps, three embeddings side by side."""

from __future__ import annotations

import argparse
import time

import numpy as np
import pandas as pd

from histossl.evaluate.labels import Labels
from histossl.evaluate.probe import probe
from histossl.evaluate.settings import ProbeSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slides", type=int, default=10_000)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--classes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    ids = [f"s{k}" for k in range(args.slides)]
    patient = rng.integers(args.slides * 2 // 3, size=args.slides)
    truth = rng.integers(args.classes, size=args.slides * 2 // 3)[patient]
    # Few factors behind many correlated non-negative features, as pooled activations have; 5 % of the labels are wrong.
    factors = rng.normal(size=(args.slides, 40))
    factors[:, 0] += truth
    noisy = np.where(rng.random(args.slides) < 0.05, rng.integers(args.classes, size=args.slides), truth)
    embeddings = {
        name: np.maximum(
            factors @ rng.normal(size=(40, args.features)) + rng.normal(size=(args.slides, args.features)), 0
        )
        for name in ("giga-ssl", "mean pooling", "untrained encoder")
    }
    table = pd.DataFrame({"patient_id": [f"p{k}" for k in patient], "label": noisy.astype(str)}, index=pd.Index(ids))
    start, cpu = time.perf_counter(), time.process_time()
    result = probe(embeddings, ids, Labels(table, ("label",)), ProbeSettings(mixed_patients=True, seed=args.seed))
    print(result.table.round(3).to_string(index=False))
    print(*result.audit, sep="\n")
    what = f"{args.slides} slides x {args.features} x {len(embeddings)} embeddings"
    print(f"{time.perf_counter() - start:.1f} s ({time.process_time() - cpu:.1f} s of CPU) for {what}")


if __name__ == "__main__":
    main()
