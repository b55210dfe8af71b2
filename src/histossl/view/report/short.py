"""The first screen of the report, what to trust in it, and a paragraph of methods to paste."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from histossl.evaluate.summary import NEW_SITES

FEW_TILES, FEW_PATIENTS = 10, 30  # fewer are worth a word
GIGA_SSL = (
    "Lazard T, Lerousseau M, Decencière E, Walter T. Giga-SSL: self-supervised learning for gigapixel images. "
    "CVPR Workshops, 2023."
)


def named(embedding: str) -> str:
    """The name of vectors for people who do not know the method's.

    Args:
        embedding: as probe.csv has it.

    Returns:
        The name, with "this method" for Giga-SSL.
    """
    return embedding.replace("giga-ssl", "this method (Giga-SSL)", 1)


def cautions(
    slides: Sequence[Mapping[str, str]], tiles: Sequence[int], probe: Mapping[str, Any] | None, painted: bool
) -> list[str]:
    """What a reader should know before believing a figure, a sentence each.

    Args:
        slides: rows of slides.csv that did not fail.
        tiles: the number of tiles of each.
        probe: the content of probe.json.
        painted: whether the slides are synthetic.

    Returns:
        The sentences, the gravest first.
    """
    found = []
    if painted:
        found.append(
            "The slides are painted by this program (histossl synth). The figures show that the program works, "
            "and nothing about real tissue."
        )
    rows = list((probe or {}).get("table", ()))
    patients = min((int(row["n_patients"]) for row in rows), default=None)
    if patients is not None and patients < FEW_PATIENTS:
        found.append(f"There are {patients} labelled patients: read the intervals, not the figures.")
    for target in dict.fromkeys(row["target"] for row in rows):
        here = [row for row in rows if row["target"] == target]
        last = [row for row in here if row["n_labelled"] == here[-1]["n_labelled"]]
        if last[-1]["embedding"].endswith(NEW_SITES):
            away = last.pop()
            if (away["difference_low"] or 0) > 0:
                scores = f"{away['auroc']:.2f} with whole sites held out, {last[0]['auroc']:.2f} otherwise"
                found.append(f"{target}: {scores}; expect the first of other hospitals.")
        equal = [row["embedding"] for row in last if row["difference_low"] is not None and row["difference_low"] <= 0]
        if equal:
            found.append(f"{target}: this method is not surely better than {' or '.join(equal)}.")
    small = sum(count < FEW_TILES for count in tiles)
    if small:
        found.append(
            f"{small} of {len(slides)} slides have fewer than {FEW_TILES} tiles: look at their pictures below."
        )
    if slides and not any(row["patient_id"] for row in slides):
        found.append("No patient is known: each slide counts as a patient. Two slides of one patient would flatter it.")
    return found


def methods(settings: Mapping[str, Any], versions: Mapping[str, str], probe: Mapping[str, Any] | None) -> str:
    """A paragraph of methods from the settings of the stages that ran.

    Args:
        settings: of each stage, resolved.
        versions: program -> version.
        probe: the content of probe.json.

    Returns:
        The paragraph; of features that another tool made only what was done with them.
    """
    tile = settings.get("inspect", {}).get("tile", {})
    encode, pretrain = settings.get("encode", {}), settings.get("pretrain", {})
    method = str((probe or {}).get("method", ""))
    if not (tile and encode):
        return method
    name = str(encode.get("encoder", {}).get("name", ""))
    own = "a tile encoder that was trained on these slides without labels"
    encoder = own if name == "model.safetensors" and "tile-encoder" in settings else f"the tile encoder {name}"
    lines = [
        f"Slides were processed with histossl {versions.get('histossl', '')}.".replace(" .", "."),
        f"Tissue was divided into tiles of {tile.get('px')} x {tile.get('px')} pixels at {tile.get('mpp')} µm "
        f"per pixel, of which at least {float(tile.get('min_tissue', 0)):.0%} were tissue.".replace("%", " %"),
        f"Tiles became features by {encoder}.",
    ]
    if pretrain:
        lines.append(
            f"A slide encoder was pretrained without labels (Giga-SSL [1]; {encode.get('views')} augmented views "
            f"of {encode.get('tiles')} tiles a slide, {pretrain.get('epochs')} epochs, "
            f"batches of {pretrain.get('batch')})."
        )
    return " ".join([*lines, method]).strip()
