"""`histossl features convert`: features of tiles between the layouts of tools."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from histossl.core.console import say
from histossl.core.errors import FileFormatError, SettingsError
from histossl.core.interchange import LAYOUTS, convert_file
from histossl.core.sidecars import files_of
from histossl.execution.failures import failure_reason, give_up_on_disk
from histossl.execution.workers import Workers

SLOWEST = 600.0  # seconds after which a file that is still not read is given up


def convert(source: Path, *, out: Path, to: str, mpp: float | None = None) -> int:
    """Convert features of slides from one tool's layout to another's, one file per slide.

    Args:
        source: a file, or a folder of them: ours (STUDY/features), TRIDENT's, CLAM's or STAMP's, recognised by content.
        out: the folder of the converted files.
        to: trident (ours too), clam, clam-pt or stamp.
        mpp: µm per level-0 pixel of all slides of the folder, where the files do not carry it.

    Returns:
        0; 1 where a file could not be converted.

    Raises:
        FileFormatError: there are no features.
        SettingsError: an unknown layout, or `out` is the folder of the source.
    """
    paths, others = ([source], []) if source.is_file() else files_of(source, (".h5", ".hdf5", ".pt"))
    if not paths:
        raise FileFormatError(f"{source}: no .h5 or .pt files", "give a file or a folder of features")
    if to not in LAYOUTS:
        raise SettingsError(f"unknown layout {to!r}", f"one of {', '.join(LAYOUTS)}")
    if out.resolve() == (source if source.is_dir() else source.parent).resolve():
        raise SettingsError(f"{out}: holds the source", "choose another --out")
    failed, work = 0, functools.partial(convert_file, out=out, to=to, mpp=mpp)
    # Files of strangers: a damaged one may kill or hang the process that reads it.
    with Workers(min(2, len(paths), os.cpu_count() or 1), SLOWEST) as readers:
        for path, answer in readers.map(work, paths):
            if isinstance(answer, Exception):
                give_up_on_disk(answer)
                say(f"FAILED {failure_reason(answer, path)}", "red")
                failed += 1
    if others:
        say(f"{len(others)} other files there were not read: {', '.join(path.name for path in others[:3])}", "yellow")
    say(f"{len(paths) - failed} of {len(paths)} slides: {out}", "green")
    return 1 if failed else 0
