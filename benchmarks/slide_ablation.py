"""What each choice of the slide encoder's training is worth: one changed at a time, every seed trained anew.

    python benchmarks/slide_ablation.py STUDY LABELS --out TABLE.csv [--seeds 0 1 2] [--epochs 100] [--batch 256]
        [--only "T = 5" ...]

STUDY holds encoded slides. `neighbours` is the default; every other variant differs in one thing from `base`, which
learns by a contrast of slides. Rows that TABLE.csv holds already are not made again. AUROC by a patient-grouped probe,
of the whole vector and of the part alone that training may move. What TABLE.csv holds is printed in Markdown at the
end: the mean over the seeds and their standard deviation.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from histossl.cli.presets import PAPER
from histossl.evaluate.labels import read_labels
from histossl.evaluate.probe import probe
from histossl.evaluate.settings import ProbeSettings
from histossl.gigassl.embed import EmbedSettings, embed_slide, mean_pool
from histossl.gigassl.encoder import SlideEncoder
from histossl.gigassl.encoder_settings import EncoderSettings
from histossl.gigassl.pretrain import pretrain_slides
from histossl.gigassl.pretrain_settings import NEIGHBOURS, PretrainSettings
from histossl.gigassl.slide_sources import SlideSource, plain_tiles
from histossl.study.folder import Study


def variants(base: PretrainSettings) -> dict[str, PretrainSettings]:
    """By name; each changes one thing."""

    def view(**changes: object) -> PretrainSettings:
        return replace(base, view=replace(base.view, **changes))

    def encoder(**changes: object) -> PretrainSettings:
        return replace(base, encoder=replace(base.encoder, **changes))

    return {
        "neighbours": replace(base, encoder=NEIGHBOURS),
        "base": base,
        "T = 5": view(tiles=5),
        "T = 32": view(tiles=32),
        "T = 256": view(tiles=256),
        "tiles at random": view(windows=0),
        "4 windows": view(windows=4),
        "neighbours 2 sites apart": encoder(spacing=2),
        "neighbours 4 sites apart": encoder(spacing=4),
        "residual MLP and mean": encoder(arch="mlp"),
        "gated attention": encoder(arch="attention"),
        "plain inlet": encoder(inlet="plain"),
        "standardised inlet": encoder(inlet="standard"),
        "temperature 0.05": replace(base, temperature=0.05),
        "temperature 0.5": replace(base, temperature=0.5),
        "scaling 0.7 to 1.3": view(scale_min=0.7, scale_max=1.3),
        "scaling 0.5 to 2": view(scale_min=0.5, scale_max=2.0),
        "no pixel augmentation": base,
        "paper": replace(PAPER, epochs=base.epochs, batch=base.batch, seed=base.seed),
    }


def vectors(name: str, settings: PretrainSettings, study: Study, ids: list[str]) -> np.ndarray:
    """(slides, d), after a training of its own."""
    # Where no views stand, the plain features serve as the one view.
    views = [study.folder / "no views" if name == "no pixel augmentation" else study.views(i) for i in ids]
    sources = [SlideSource(i, study.features(i), v) for i, v in zip(ids, views, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "slide-encoder"
        pretrain_slides(sources, settings, made, Path(folder) / "logs", "ablation")
        encoder = SlideEncoder.load(made)
    rows = (plain_tiles(source.features) for source in sources)
    chosen = EmbedSettings(views=20)
    return np.stack([embed_slide(encoder, *row, settings.view, chosen, i) for i, row in zip(ids, rows, strict=True)])


def markdown(table: pd.DataFrame) -> str:
    """A row a variant: how many seeds; of each target the whole vector with 25 / 50 labels, its part with 25."""
    table = table.assign(n_labelled=table.n_labelled.astype(str))
    pooled = table[table.embedding == "mean pooling"].assign(variant="mean pooling", embedding="whole")
    table = pd.concat([table[table.embedding != "mean pooling"], pooled])
    columns = [(target, part) for part in ("whole", "contrasted") for target in sorted(table.target.unique())]
    lines = ["| | seeds | " + " | ".join(f"{target}, {part}" for target, part in columns) + " |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    for name, rows in table.groupby("variant", sort=False):
        cells = []
        for target, part in columns:
            found = rows[(rows.target == target) & (rows.embedding == part)].groupby("n_labelled").auroc
            shots = [n for n in (("25", "50") if part == "whole" else ("25",)) if n in found.groups]
            told = (f"{found.get_group(n).mean():.3f} ± {found.get_group(n).std():.3f}" for n in shots)
            cells.append(" / ".join(told).replace("0.", "."))
        lines.append(f"| {name} | {rows.seed.nunique()} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Append a row a variant, seed, vector, target and number of labels."""
    parser = argparse.ArgumentParser()
    parser.add_argument("study", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch", type=int, default=256, help="slides a step, at most")
    parser.add_argument("--tiles", type=int, default=128, help="T of `base`")
    parser.add_argument("--only", nargs="+", default=list(variants(PretrainSettings())))
    options = parser.parse_args()
    study = Study(options.study)
    rows = study.encoded()
    ids = [row["slide_id"] for row in rows]
    labels = read_labels(options.labels, ids, (), {})
    settings = ProbeSettings(shots=(25, 50), bootstraps=100)
    done = pd.read_csv(options.out) if options.out.exists() else pd.DataFrame(columns=["variant", "seed"])
    for seed in options.seeds:
        base = PretrainSettings(epochs=options.epochs, batch=options.batch, seed=seed, encoder=EncoderSettings())
        base = replace(base, view=replace(base.view, tiles=options.tiles))
        for name in options.only:
            if ((done.variant == name) & (done.seed == seed)).any():
                continue
            start, chosen = time.monotonic(), variants(base)[name]
            found = vectors(name, chosen, study, ids)
            seconds = time.monotonic() - start
            parts = {"whole": found, "contrasted": found[:, : chosen.encoder.contrasted_dim]}
            parts |= {"mean pooling": np.stack([mean_pool(plain_tiles(study.features(i))[0]) for i in ids])}
            table = probe(parts, ids, labels, settings).table
            table = table[["target", "n_labelled", "embedding", "auroc"]].assign(
                variant=name, seed=seed, seconds=round(seconds)
            )
            done = pd.concat([done, table], ignore_index=True)
            done.to_csv(options.out, index=False)
            print(table.pivot_table(index="embedding", columns=["target", "n_labelled"], values="auroc").round(3), name)
    print(markdown(done))


if __name__ == "__main__":
    main()
