"""`histossl doctor`: what is installed, what is missing, and whether `histossl run` can work here."""

from __future__ import annotations

import ctypes.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path

import psutil
from rich.markup import escape
from rich.table import Table

from histossl.core import answers
from histossl.encoders.model_names import INSTALL

# Distribution -> module that `histossl run` imports.
NEEDED = {
    "torch": "torch",
    "lightning-fabric": "lightning_fabric",
    "openslide-python": "openslide",
    "tiffslide": "tiffslide",
    "tifffile": "tifffile",
    "imagecodecs": "imagecodecs",
    "h5py": "h5py",
    "anndata": "anndata",
    "safetensors": "safetensors",
    "scikit-learn": "sklearn",
    "scikit-image": "skimage",
    "numba": "numba",
    "shapely": "shapely",
    "matplotlib": "matplotlib",
}
# Distribution that only some features need -> (module, what it is for, what installs it).
OPTIONAL = {
    "pyarrow": ("pyarrow", "nuclei as GeoParquet", "pip install 'histossl[nuclei]'"),
    "zarr": ("zarr", "nuclei as OME-Zarr", "pip install 'histossl[nuclei]'"),
    "wsidicom": ("wsidicom", "DICOM that OpenSlide refuses", "pip install 'histossl[dicom]'"),
    "timm": ("timm", "tile encoders timm:NAME", INSTALL["timm"]),
    "transformers": ("transformers", "tile encoders hf:NAME", INSTALL["transformers"]),
    "onnxruntime": ("onnxruntime", "models as ONNX", "pip install 'histossl[onnx]'"),
    "huggingface_hub": ("huggingface_hub", "models hf:OWNER/NAME", "pip install 'histossl[hub]'"),
    "distributed": ("distributed", "Dask and SLURM clusters", "pip install 'histossl[cluster]'"),
}
MEMORY, DISK = 4 * 2**30, 2 * 2**30  # below them a run is likely to fail


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table.

    Attributes:
        what: what was checked.
        state: "ok", "note" or "missing"; `histossl run` cannot work if anything is missing.
        text: version, amount or advice.
    """

    what: str
    state: str
    text: str


def doctor(study: Path = Path(".")) -> int:
    """What is installed, what is missing, GPU, disk, memory; exit code 1 if histossl cannot run here.

    Args:
        study: folder of a study, existing or planned: its disk is checked.

    Returns:
        The exit code, 0 or 1.
    """
    of_libraries = list(libraries())
    findings = [*machine(), *folder(study), *system(), *of_libraries]
    fine = [found for found in of_libraries if found.state == "ok"]
    shown = [found for found in findings if found not in fine]
    shown.append(Finding("libraries", "ok", ", ".join(f"{found.what} {found.text}" for found in fine)))
    table = Table(box=None, show_header=False)
    colours = {"ok": "green", "note": "yellow", "missing": "bold red"}
    for found in shown:
        table.add_row(f"[{colours[found.state]}]{found.state}[/]", escape(found.what), escape(found.text))
    answers.give("findings", [vars(found) for found in findings], table)
    wrong = [found.what for found in findings if found.state == "missing"]
    verdict = f"histossl cannot run here: {', '.join(wrong)}" if wrong else "histossl can run here"
    answers.give("runs", not wrong, verdict)
    return 1 if wrong else 0


def libraries() -> Iterator[Finding]:
    """Findings about Python, the required and the optional libraries."""
    yield Finding("Python", "ok", platform.python_version())
    for name, module in NEEDED.items():
        yield _imported(name, module, "missing", f"pip install {name}")
    for name, (module, purpose, extra) in OPTIONAL.items():
        yield _imported(name, module, "note", f"not installed; only for {purpose}: {extra}")


def _imported(name: str, module: str, otherwise: str, hint: str) -> Finding:
    try:
        import_module(module)
        return Finding(name, "ok", metadata.version(name))
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # a broken build fails in any of these ways
        absent = isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]
        return Finding(name, otherwise, hint if absent else f"cannot be imported ({type(error).__name__}: {error})")


def system() -> Iterator[Finding]:
    """What this operating system lacks that others have, and what is lost without it."""
    if _importable("fcntl"):
        yield Finding("locks", "ok", "two runs can share a study")
    else:
        yield Finding("locks", "note", "no fcntl here: locks of studies go through SQLite, on local disks only")
    if _importable("resource"):
        yield Finding("limits", "ok", "a slide that needs too much memory ends its worker, not the run")
    else:
        yield Finding("limits", "note", "no limit of memory here: a slide that needs too much may slow the machine")


def _importable(module: str) -> bool:
    """Whether a module of the standard library is there."""
    try:
        import_module(module)
    except ImportError:
        return False
    return True


def machine() -> Iterator[Finding]:
    """Findings about cores, memory, GPU and the precision that networks compute in."""
    memory = psutil.virtual_memory()
    state = "ok" if memory.available >= MEMORY else "note"
    text = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
    yield Finding("memory", state, text if state == "ok" else f"{text}; a run wants {MEMORY / 2**30:.0f}")
    yield Finding(
        "cores", "ok", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    )
    try:
        import torch

        from histossl.training.device import pick_device, pick_dtype
    except (ImportError, OSError):
        return
    device = pick_device("auto")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "none: the processor computes"
    yield Finding("GPU", "ok" if device.type == "cuda" else "note", name)
    if device.type == "cpu" and ctypes.util.find_library("cuda"):
        yield Finding("CUDA", "note", "a driver is here, but this torch does not use it: install a CUDA build of torch")
    yield Finding("precision", "ok", str(pick_dtype("auto", device)).removeprefix("torch."))


def folder(study: Path) -> Iterator[Finding]:
    """Findings about the study's folder: the free space of its disk, and whether it can be written.

    Args:
        study: the folder; where it does not exist, its nearest parent is checked.

    Yields:
        The findings.
    """
    existing = next(parent for parent in (study.absolute(), *study.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    yield Finding("disk", "ok" if free >= DISK else "missing", f"{free / 2**30:.1f} GiB free at {existing}")
    if not os.access(existing, os.W_OK):
        yield Finding("folder", "missing", f"{existing} cannot be written")
