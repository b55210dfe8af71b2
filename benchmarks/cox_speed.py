"""How long the Cox probe takes: 10,000 patients x 1,280 numbers, 5 x 5 folds; one fit beside lifelines."""

from __future__ import annotations

import argparse
import time

import numpy as np
import pandas as pd
from lifelines import CoxPHFitter

from histossl.evaluate.cox import prepare_cox, solve_cox
from histossl.evaluate.labels import Labels
from histossl.evaluate.probe import probe
from histossl.evaluate.settings import ProbeSettings


def patients(count: int, features: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Few factors behind many correlated non-negative features, as pooled activations have; and time and event."""
    factors = rng.normal(size=(count, 40))
    x = np.maximum(factors @ rng.normal(size=(40, features)) + rng.normal(size=(count, features)), 0)
    event, contact = rng.exponential(60 / np.exp(factors[:, 0])), rng.uniform(6, 120, count)
    months = np.maximum(np.minimum(event, contact).round(1), 0.1)
    return x, np.column_stack([months, event <= contact])


def against_lifelines(count: int, features: int, rng: np.random.Generator) -> None:
    """One fit by both, the same penalty, times rounded to tenths of a month so that there are ties."""
    x, truth = patients(count, features, rng)
    z, alpha = (x - x.mean(axis=0)) / x.std(axis=0, ddof=1), 10.0  # as lifelines scales features
    start = time.perf_counter()
    ours = solve_cox(prepare_cox(z, truth), alpha, tolerance=1e-10)
    middle = time.perf_counter()
    table = pd.DataFrame(z).assign(time=truth[:, 0], event=truth[:, 1])
    fitter = CoxPHFitter(penalizer=alpha / count)
    theirs = fitter.fit(table, "time", "event", fit_options={"precision": 1e-9}).params_.to_numpy()
    end = time.perf_counter()
    print(
        f"one fit of {count} x {features}: ours {middle - start:.2f} s, lifelines {end - middle:.2f} s, "
        f"{(end - middle) / (middle - start):.0f} times; largest difference {np.abs(ours - theirs).max():.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patients", type=int, default=10_000)
    parser.add_argument("--features", type=int, default=1280)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lifelines", type=int, nargs=2, default=(2000, 160), help="patients and features of one fit")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    against_lifelines(200, 8, rng)  # compiles
    against_lifelines(*args.lifelines, rng)
    x, truth = patients(args.patients, args.features, rng)
    ids = [f"p{k}" for k in range(args.patients)]
    outcomes = [f"{time!r}{'' if event else '+'}" for time, event in truth.tolist()]
    table = pd.DataFrame({"patient_id": ids, "os": outcomes}, index=pd.Index(ids))
    labels = Labels(table, ("os",), outcomes={"os": "months"})
    settings = ProbeSettings(shots=(), seed=args.seed, repeats=args.repeats)
    start, cpu = time.perf_counter(), time.process_time()
    result = probe({"v": x.astype(np.float32)}, ids, labels, settings)
    took, used = time.perf_counter() - start, time.process_time() - cpu
    print(result.survival.round(3).to_string(index=False))
    what = f"{args.patients} patients x {args.features}, {settings.repeats} x {settings.folds} folds"
    print(f"{took:.0f} s ({used:.0f} s of CPU) for {what}, {settings.bootstraps} bootstraps")


if __name__ == "__main__":
    main()
