"""What a study learned, as a folder for others: weights, settings and a model card."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import histossl
from histossl.core.atomic import whole_folder
from histossl.core.config import check_choice
from histossl.core.errors import FileFormatError, StudyError, file_errors

USES = {
    "slide-encoder": "histossl embed NEW --weights FOLDER",
    "tile-encoder": "histossl encode NEW --encoder FOLDER",
    "nuclei": "histossl nuclei segment SLIDES --model FOLDER --out FOUND",
    "probe": "histossl predict FOLDER NEW_SLIDES --out NEW",
}
"""What can be exported -> the command that takes it."""

NAMES_IN = {
    "slide-encoder": "config.json names the slides that it was trained on.",
    "probe": "probe/ holds names, patients, labels and vectors of the known slides: share it as you may share these.",
}


def export_model(source: Path, what: str, out: Path, onnx: bool = False) -> None:
    """Write a model of a study into a folder of its own, with a model card: README.md.

    Args:
        source: the study; of nuclei the folder that `nuclei train` wrote.
        what: slide-encoder, tile-encoder, nuclei or probe; with the probe go the encoders that made its vectors.
        out: the new folder.
        onnx: also write model.onnx, see `write_onnx`; of tile-encoder and nuclei.

    Raises:
        SettingsError: `what` is none of these, or has no ONNX; or a library is missing.
        StudyError: `out` holds something.
        FileFormatError: the study has no such model.
    """
    check_choice("--what", what, list(USES))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StudyError(f"{out}: holds something already", "name a new folder")
    folder = source if what == "nuclei" else source / what
    if not all((folder / name).is_file() for name in ("model.safetensors", "config.json")):
        hint = (
            "the tile encoder may be one with a name, which others give by that name" if what == "tile-encoder" else ""
        )
        raise FileFormatError(f"{folder}: no model.safetensors and config.json", hint or f"see `histossl {what}`")
    with whole_folder(out) as part:
        if what == "probe":
            for name in ("probe", "slide-encoder", "tile-encoder"):
                if (source / name).is_dir():
                    shutil.copytree(source / name, part / name)
        else:
            for name in ("model.safetensors", "untrained.safetensors", "config.json"):
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, part / name)
        if onnx:
            from histossl.study.onnx_models import write_onnx

            write_onnx(what, folder, part / "model.onnx")
        (part / "README.md").write_text(_card(source, what, folder / "config.json", part), encoding="utf-8")


def _card(source: Path, what: str, config: Path, folder: Path) -> str:
    """The model card, as Hugging Face reads it too."""
    with file_errors(config, "make the model anew"):
        about: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = [f"    {hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}" for path in files]
    slides = about.get("slides") or (about.get("about") or {}).get("slides")
    data = f"{len(slides)} slides." if slides else "Slides whose number the settings do not say."
    settings = {name: value for name, value in about.items() if name in ("settings", "stages", "tile", "method")}
    told = json.dumps(settings or {"keys": sorted(about)}, indent=1, ensure_ascii=False).splitlines()
    return "\n".join(
        [
            "---\nlibrary_name: histossl\ntags: [histopathology]\n---",
            f"# {what} of {source.resolve().name}\n",
            f"Made by histossl {histossl.__version__}. For research; never a diagnosis.\n",
            f"## Use\n\n    {USES[what]}\n",
            f"## Data\n\n{data} {NAMES_IN.get(what, '')}".rstrip() + "\n",
            f"## Figures\n\n{_figures(source)}\n",
            "## Licence\n\nNone is given with the weights: state one here before you share them, as the data allow.\n",
            "## Files (SHA-256)\n\n" + "\n".join(hashes) + "\n",
            "## Settings\n\n" + "\n".join(f"    {line}" for line in told) + "\n",
        ]
    )


def _figures(source: Path) -> str:
    """The scores of the probe of the study, with all labels; a line where there is none."""
    path = source / "probe.json"
    if not path.is_file():
        return "None: the study was not probed."
    with file_errors(path, "run `histossl probe` again, or remove it"):
        content = json.loads(path.read_text(encoding="utf-8"))
        lines = []
        for table, score in (("table", "auroc"), ("numbers", "spearman"), ("survival", "c_index")):
            for row in content.get(table, ()):
                if row["n_labelled"] == "all":
                    told = f"{row[score]:.2f} ({row['low']:.2f} to {row['high']:.2f})"
                    lines.append(f"| {row['target']} | {row['embedding']} | {score} | {told} |")
    head = "| target | vectors | score | value (95 % interval) |\n|---|---|---|---|\n"
    return f"On patients held out:\n\n{head}" + "\n".join(lines)
