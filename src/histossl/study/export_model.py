"""Models for other groups: the files of one, with a model card, and without the names of slides and patients."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import histossl
from histossl.core import atomic
from histossl.core.errors import SettingsError, StudyError, file_errors
from histossl.evaluate.saved_probe import SavedProbe

FILES = ("model.safetensors", "untrained.safetensors", "config.json")
KINDS = {
    "slide-encoder": ("slide-encoder", "a slide encoder: features of tiles in, one vector a slide out",
                      "histossl embed FEATURES --weights {out} --out STUDY"),
    "tile-encoder": ("tile-encoder", "a tile encoder: pixels of a tile in, its features out",
                     "histossl run SLIDES --encoder {out} --out STUDY"),
    "probe": ("probe-model", "a linear probe: the vector of a slide in, probabilities of classes out",
              "histossl predict STUDY NEW_SLIDES --probe {out} --out PREDICTED"),
    "nuclei": (".", "a nuclei model: pixels in, outlines of nuclei out",
               "histossl nuclei segment SLIDES --model {out} --out FOUND"),
}  # fmt: skip


def export_model(source: Path, kind: str, out: Path, target: str = "", licence: str = "") -> str:
    """Write a model and its card into a folder that the commands take by its path.

    Names of slides and patients are left out: of a probe they become numbers. Its cohort's vectors and labels stay,
    since predictions are compared with them.

    Args:
        source: the folder of a study; of nuclei, the folder that `histossl nuclei train` wrote.
        kind: one of `KINDS`.
        out: the new folder.
        target: of a probe, its target; may be empty where the study has one.
        licence: under which the model is given, for the card.

    Returns:
        The SHA-256 of model.safetensors.

    Raises:
        StudyError: the model is not there, or `out` exists.
        SettingsError: an unknown kind, or several targets to choose from.
        FileFormatError: the model cannot be read.
    """
    if kind not in KINDS:
        raise SettingsError(f"--what {kind}", f"choose {', '.join(KINDS)}")
    place = source / KINDS[kind][0]
    if kind == "probe":
        place = _chosen(place, target)
    if not (place / "model.safetensors").is_file():
        raise StudyError(
            f"{place}: there is no {kind} with model.safetensors", "train one first, or name another folder"
        )
    if out.exists():
        raise StudyError(f"{out}: exists", "name a new folder")
    with file_errors(place, "train the model anew"), atomic.whole_folder(out) as part:
        if kind == "probe":
            _nameless(SavedProbe.load(place)).write(part)
        for name in FILES if kind != "probe" else ():
            if (place / name).is_file():
                (part / name).write_bytes((place / name).read_bytes())
        config = json.loads((part / "config.json").read_text(encoding="utf-8"))
        count = _strip(config)
        (part / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")
        digest = hashlib.sha256((part / "model.safetensors").read_bytes()).hexdigest()
        card = _card(source, kind, config, count, digest, licence)
        (part / "README.md").write_text(card, encoding="utf-8")
    return digest


def _chosen(place: Path, target: str) -> Path:
    """The folder of one target of the saved probes."""
    there = sorted(folder.name for folder in place.iterdir() if folder.is_dir()) if place.is_dir() else []
    if not there:
        raise StudyError(f"{place}: there is no saved probe", "run `histossl probe STUDY --labels` first")
    if target not in there and (target or len(there) > 1):
        raise SettingsError(f"--target {target}", f"choose {', '.join(there)}")
    return place / (target or there[0])


def _nameless(probe: SavedProbe) -> SavedProbe:
    """The probe with numbers for slides and patients."""
    people = {name: f"patient {k}" for k, name in enumerate(dict.fromkeys(probe.patients), 1)}
    slides = tuple(f"slide {k}" for k in range(1, len(probe.slides) + 1))
    return replace(probe, slides=slides, patients=tuple(people[name] for name in probe.patients))


def _strip(config: dict[str, Any]) -> int:
    """Take the names of slides out of a config.json in place; their number."""
    count = 0
    if config.get("classes"):  # of a probe, whose names are numbers already
        return len(config["slides"])
    for entry, empty in ((config, []), (config.get("about"), None)):
        for key in ("slides", "images"):
            if isinstance(entry, dict) and isinstance(entry.get(key), list):
                count, entry[key] = max(count, len(entry[key])), empty
    return count


def _card(source: Path, kind: str, config: dict[str, Any], count: int, digest: str, licence: str) -> str:
    about, use = KINDS[kind][1:]
    learned = {"probe": "with their labels"}.get(kind, "without labels")
    given = f"Licence: {licence}." if licence else "The licence is not stated: ask whoever gave you this folder."
    shown = {name: value for name, value in config.items() if name not in ("slides", "patients", "labels")}
    parts = [
        f"---\nlibrary_name: histossl\nlicense: {licence or 'unknown'}\ntags: [histopathology]\n---\n",
        f"# {config.get('target') or kind}\n\nThis is {about}. It is for research, and no medical device.\n",
        f"```sh\n{use.format(out='THIS_FOLDER')}\n```\n",
        f"- Learned from {count or 'an unknown number of'} slides, {learned}.\n- {given}\n"
        f"- histossl {histossl.__version__}; SHA-256 of model.safetensors: `{digest}`.\n",
        *_figures(source, str(config.get("target", ""))),
        f"## Settings\n\n```json\n{json.dumps(shown, indent=1, ensure_ascii=False, default=str)}\n```\n",
    ]
    return "\n".join(parts)


def _figures(source: Path, target: str) -> list[str]:
    """The scores of the study's probe with all labels, where there are any."""
    path = source / "probe.json"
    if not path.is_file():
        return []
    with file_errors(path, "run `histossl probe` again, or remove it"):
        rows = json.loads(path.read_text(encoding="utf-8"))["table"]
        rows = [row for row in rows if row["n_labelled"] == "all" and target in ("", row["target"])]
        lines = [
            f"| {r['target']} | {r['embedding']} | {r['auroc']:.3f} ({r['low']:.3f} to {r['high']:.3f}) |" for r in rows
        ]
    head = (
        "## Figures\n\nPatients held out, 95 % interval over patients.\n\n| target | vectors | AUROC |\n|---|---|---|"
    )
    return ["\n".join([head, *lines, ""])] if lines else []
