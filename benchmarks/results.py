"""Make docs/results.md and README's table again: real tiles, lymphoma and the painted kinds, few labels and all.

    python benchmarks/results.py                                        # everything, hours on two cores
    python benchmarks/results.py --lymphoma-study STUDY --synthetic-study STUDY --tiles-study STUDY --tiles-labels CSV
    python benchmarks/results.py --only sparse                          # one step; the last, page, needs no other

Steps, in order: studies (made where no --…-study is given), attention, sparse, finetune, split, page. Whatever stands
under --out is not made again, so that an interrupted run goes on where it was, and steps may run side by side. The
lymphoma fields are looked for in $HISTOSSL_DATA/cohort/lymphoma (slides/ and labels.csv); the painted study keeps its
slides and labels.csv in its own cohort/, as `histossl demo` does. Slides composed of real tiles are judged as
`real_tiles.py` does, where a study of them is given.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from histossl.core.atomic import whole
from histossl.evaluate.labels import Labels, read_labels
from histossl.evaluate.probe import write_probe
from histossl.evaluate.rivals import probe_with_rivals
from histossl.evaluate.settings import TRAINED, ProbeSettings
from histossl.evaluate.sources import Source, read_source
from real_tiles import TASKS, measured
from results_page import Found, draw_shots_picture, draw_split_picture, page, readme, tiles_section

STEPS = ("studies", *TRAINED, "split", "page")
CHEAP = ("mean", "deviation", "max", "knn")
LYMPHOMA_FLAGS = "--mpp-default 0.5 --tile.px 105 --tile.mpp 0.5 --encode.views 4 --encode.tiles 64 --encode.window 16"
SYNTHETIC_FLAGS = "--tile.px 64 --tile.mpp 1.0 --encode.views 4 --encode.tiles 256"

SEED = 200  # of the painted cohort: none that a setting was chosen on


@dataclass(frozen=True)
class Cohort:
    """A study and the labels of its slides, which none of its stages has seen."""

    name: str
    study: Path
    slides: Path
    labels: Path

    def source(self) -> Source:
        return read_source(self.study)

    def embedded(self) -> bool:
        return (self.study / "embeddings.h5ad").exists()

    def table(self, source: Source) -> Labels:
        return read_labels(self.labels, source.ids, (), source.patients)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lymphoma-study", type=Path, help="made under --out where not given")
    parser.add_argument("--synthetic-study", type=Path, help="made under --out where not given")
    parser.add_argument("--tiles-study", type=Path, help="slides composed of real tiles, embedded")
    parser.add_argument("--tiles-labels", type=Path, help="their table, as real_tiles.py takes it")
    parser.add_argument("--tiles-draws", type=int, default=20)
    parser.add_argument("--lymphoma", type=Path, default=Path(os.environ.get("HISTOSSL_DATA", ".")) / "cohort/lymphoma")
    parser.add_argument("--out", type=Path, default=Path("out/results"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--only", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--rivals", nargs="*", choices=TRAINED, default=list(TRAINED), help="trained ones on the page")
    parser.add_argument("--flags", default="", help="of `histossl run`, for both studies")
    parser.add_argument("--slides", type=int, default=96, help="to paint")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--shots", type=int, nargs="+", default=[25, 50, 100])
    parser.add_argument("--bootstraps", type=int, default=1000)
    args = parser.parse_args(argv)
    cohorts = [
        Cohort("lymphoma", args.lymphoma_study or args.out / "lymphoma", args.lymphoma / "slides",
               args.lymphoma / "labels.csv"),
        painted(args.synthetic_study or args.out / "synthetic"),
    ]  # fmt: skip
    settings = ProbeSettings(
        folds=args.folds, repeats=args.repeats, shots=tuple(args.shots), bootstraps=args.bootstraps
    )
    for step in (step for step in STEPS if step in args.only):
        print(f"== {step}", flush=True)
        if step == "studies":
            make_studies(cohorts, args)
        elif step == "split":
            split = by_field_and_by_patient(cohorts[0], settings, args.out)
            print(split[["split", "embedding", "auroc", "low", "high"]].round(3).to_string(index=False))
            args.docs.mkdir(parents=True, exist_ok=True)
            draw_split_picture(split, args.docs / "split.png")
        elif step == "page":
            write_page(cohorts, replace(settings, rivals=(*CHEAP, *args.rivals)), args)
        else:
            for cohort in cohorts:
                source = cohort.source()
                quick = replace(settings, rivals=(step,), bootstraps=100)
                probe_with_rivals(source, cohort.table(source), quick, args.out / "rivals")


def painted(study: Path) -> Cohort:
    return Cohort("synthetic", study, study / "cohort" / "slides", study / "cohort" / "labels.csv")


def make_studies(cohorts: list[Cohort], args: argparse.Namespace) -> None:
    """Paint what is to be painted, and let each study learn from its slides; no label is given."""
    lymphoma, synthetic = cohorts
    histossl = [sys.executable, "-m", "histossl"]
    if args.synthetic_study is None:
        if not synthetic.labels.exists():
            flags = ["--slides", str(args.slides), "--seed", str(SEED)]
            subprocess.run([*histossl, "synth", synthetic.labels.parent, *flags], check=True)
        run(histossl, synthetic, f"{SYNTHETIC_FLAGS} {args.flags}")
    if args.lymphoma_study is None:
        run(histossl, lymphoma, f"{LYMPHOMA_FLAGS} {args.flags}")


def run(histossl: list[str], cohort: Cohort, flags: str) -> None:
    """`histossl run`, which goes on where it was."""
    command = [*histossl, "run", str(cohort.slides), "--out", str(cohort.study), *flags.split()]
    code = subprocess.run(command).returncode
    if code not in (0, 1):  # 1: a slide was left out, with its reason
        raise SystemExit(f"{' '.join(command)} ended with {code}")


def colours(cohort: Cohort, out: Path) -> pd.DataFrame:
    """Plain statistics of colour and texture of each picture of a cohort: `colours.csv`, a row a slide."""
    path = out / "colours.csv"
    if not path.exists():
        files = sorted(file for file in cohort.slides.iterdir() if file.is_file())
        rows = pd.DataFrame({file.stem: statistics(read(file)) for file in files}).T
        with whole(path) as part:
            rows.rename_axis("slide_id").to_csv(part)
    return pd.read_csv(path, dtype={"slide_id": str}).set_index("slide_id")


def read(path: Path) -> np.ndarray:
    """Every other pixel of a picture."""
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))[::2, ::2]


def statistics(pixels: np.ndarray) -> dict[str, float]:
    """Mean, deviation and deciles of red, green, blue and of hematoxylin and eosin; how much neighbours differ, on four
    scales; how often each local binary pattern occurs."""
    from skimage.color import rgb2hed
    from skimage.feature import local_binary_pattern
    from skimage.transform import downscale_local_mean

    found: dict[str, float] = {}
    planes = np.dstack([pixels / 255.0, rgb2hed(pixels)[..., :2]])
    for name, plane in zip(("red", "green", "blue", "hematoxylin", "eosin"), np.moveaxis(planes, 2, 0), strict=True):
        found |= {f"{name} mean": plane.mean(), f"{name} deviation": plane.std()}
        found |= {
            f"{name} {q} %": value for q, value in zip((10, 50, 90), np.percentile(plane, (10, 50, 90)), strict=True)
        }
        for scale in (1, 2, 4, 8):
            small = downscale_local_mean(plane, (scale, scale))
            found[f"{name} steps {scale}"] = (
                np.abs(np.diff(small, axis=0)).mean() + np.abs(np.diff(small, axis=1)).mean()
            )
    patterns = local_binary_pattern(pixels.mean(axis=2).astype(np.uint8), 8, 1, "uniform")
    return found | {f"pattern {k}": float((patterns == k).mean()) for k in range(10)}


def write_page(cohorts: list[Cohort], settings: ProbeSettings, args: argparse.Namespace) -> None:
    """Judge everything on the same splits, draw, and write results.md."""
    found = []
    for cohort in cohorts:
        source = cohort.source()
        result = probe_with_rivals(source, cohort.table(source), settings, args.out / "rivals")
        write_probe(result, args.out / "probes" / cohort.name)
        places = [path for name in source.ids if (path := source.paths.get(name)) and path.exists()]
        size = sum(path.stat().st_size for path in places)
        found.append(Found(cohort.name, result, size, next(iter(source.vectors.values())).shape))
    split = by_field_and_by_patient(cohorts[0], settings, args.out)
    tiles = None
    if args.tiles_study:
        tiles = measured(args.tiles_study, args.tiles_labels, TASKS, args.tiles_draws)
    args.docs.mkdir(parents=True, exist_ok=True)
    draw_shots_picture(found, args.docs / "results.png")
    draw_split_picture(split, args.docs / "split.png")
    with whole(args.docs / "results.md") as part:
        part.write_text(page(found, split, settings, command(args), tiles_section(tiles)), encoding="utf-8")
    if args.readme.exists():
        text = readme(args.readme.read_text(encoding="utf-8"), found, tiles)
        with whole(args.readme) as part:
            part.write_text(text, encoding="utf-8")
    print(f"done: {args.docs / 'results.md'} and the table of {args.readme}")


def by_field_and_by_patient(cohort: Cohort, settings: ProbeSettings, out: Path) -> pd.DataFrame:
    """AUROC of the same vectors and the same fields, once with each field and once with each patient held out whole;
    where no study stands, of colour and texture alone."""
    plain = colours(cohort, out)
    kept, vectors = list(plain.index), {}
    if cohort.embedded():
        source = cohort.source()
        kept = [name for name in source.ids if name in plain.index]
        rows = [source.ids.index(name) for name in kept]
        vectors = {name: values[rows] for name, values in source.vectors.items()}
    rows = plain.loc[kept]
    rows = (rows - rows.mean()) / rows.std(ddof=0).clip(lower=1e-9)  # they have different units
    same = Source(tuple(kept), {"colour and texture": rows.to_numpy(np.float32), **vectors})
    by_patient = read_labels(cohort.labels, kept)
    by_field = replace(by_patient, table=by_patient.table.assign(patient_id=by_patient.table.index))
    quick, tables = replace(settings, shots=(), rivals=()), []
    for way, labels in (("by field", by_field), ("by patient", by_patient)):
        tables.append(probe_with_rivals(same, labels, quick).table.assign(split=way))
    return pd.concat(tables, ignore_index=True)


def command(args: argparse.Namespace) -> str:
    """What makes the page again, as it was made now but for the places of the studies."""
    words = ["python benchmarks/results.py"]
    words += ["--tiles-study STUDY --tiles-labels LABELS"] if args.tiles_study else []
    for name, usual in (("slides", 96), ("repeats", 5), ("folds", 5), ("bootstraps", 1000)):
        if getattr(args, name) != usual:
            words.append(f"--{name} {getattr(args, name)}")
    words += [f"--shots {' '.join(map(str, args.shots))}"] if args.shots != [25, 50, 100] else []
    words += [f"--flags '{args.flags}'"] if args.flags else []
    words += [f"--rivals {' '.join(args.rivals)}"] if args.rivals != list(TRAINED) else []
    return " ".join(words)


if __name__ == "__main__":
    main()
