"""What slides, tiles and tasks cost, how processes share them, and what a training takes as cohorts grow.

    python benchmarks/scaling.py [slides | overhead | processes | dask | training] ...

Without arguments all of them, which takes a quarter of an hour. Seconds are of the clock and, in brackets, of the
processor; where other programs are at work only the latter say anything.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil

from histossl.core import fingerprints
from histossl.wsi import tile_files

TASKS, SLIDES, STEPS = 40, 16, 4
VIEWS = (10, 256, 256)  # of each simulated slide: views, tiles, features


def spent() -> float:
    """Seconds of the processor of this process and of its children, those at work included."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    ended = me.cpu_times()
    return sum(one.user + one.system for one in times) + ended.children_user + ended.children_system


def histossl(*words: str) -> subprocess.Popen:
    """The program, in a process of its own with one thread."""
    command = [sys.executable, "-m", "histossl", *words]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, stdout=quiet, stderr=quiet, env={**os.environ, "OMP_NUM_THREADS": "1"})


def ended(*runs: subprocess.Popen) -> tuple[float, float]:
    """(Seconds of the clock until all have ended well, of the processor)."""
    start, before = time.perf_counter(), sum(os.times()[2:4])
    for run in runs:
        if run.wait():
            raise SystemExit(f"{run.args} failed")
    return time.perf_counter() - start, sum(os.times()[2:4]) - before


def paint(folder: Path, slides: int, side: int = 4000) -> Path:
    """A folder of painted slides, written once."""
    from histossl.wsi.synth import SynthSettings, write_slide

    for k in range(slides):
        path = folder / f"s{k}.tiff"
        if not path.exists():
            write_slide(path, SynthSettings(width=side, height=side, mpp=0.5, patch_um=224.0, seed=k))
    return folder


def of_slides() -> None:
    """Cost of a slide and a tile, bytes a slide and a tile: of inspect, of features, of views."""

    painted = paint(Path("out/benchmarks/scaling"), SLIDES)
    with tempfile.TemporaryDirectory() as out:
        study = Path(out)
        inspected = ended(histossl("inspect", str(painted), "--out", out, "--workers=1"))[1]
        flags = ["--encoder=random", "--encode.precision=float32", "--workers=1", "--device=cpu"]
        plain = ended(histossl("encode", out, "--encode.views=0", *flags))[1]
        begun = ended(histossl("encode", out, "--encode.views=0", *flags))[1]  # finds nothing to do
        tiles = sum(len(tile_files.read_tiles_of(path).xy) for path in (study / "tiles").iterdir())
        written = _size(study / "features")
    with tempfile.TemporaryDirectory() as out:
        ended(histossl("inspect", str(painted), "--out", out, "--workers=1"))
        both = ended(histossl("encode", out, "--encode.views=4", "--encode.tiles=32", *flags))[1]
        views = _size(Path(out) / "views")
    drawn = SLIDES * 4 * 32
    print(f"{SLIDES} slides of 16 megapixels, {tiles} tiles of 224 px; seconds of the processor")
    print(f"inspect: {inspected / SLIDES:.2f} s a slide, the start of the program included")
    print(f"start of a run: {begun:.1f} s")
    print(f"features: {(plain - begun) / tiles * 1000:.1f} ms a tile, {written / tiles:.0f} bytes a tile")
    print(f"views: {(both - plain) / drawn * 1000:.1f} ms a tile and view, {views / drawn:.0f} bytes")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def second(slide: object) -> None:
    """A slide that takes a second."""
    time.sleep(1)


def spin(item: int) -> float:
    """Work for one core; seconds of the processor that it took."""
    start = time.process_time()
    total = 0
    for k in range(6_000_000):
        total += k * k
    return time.process_time() - start


def nothing(item: int) -> int:
    """A task that costs nothing."""
    return item


def of_overhead() -> None:
    """What the runner adds to slides of one second: claims, log, table, worker processes."""
    from histossl.execution.journal import Journal, StageQueue
    from histossl.execution.workers import Workers
    from histossl.study.folder import COLUMNS, Study

    with tempfile.TemporaryDirectory() as out, Workers(2) as workers:
        study = Study(out)
        names = [f"s{k}" for k in range(TASKS)]
        rows = [dict.fromkeys(COLUMNS, "") | {"slide_id": name, "path": f"/{name}.svs"} for name in names]
        study.write_slides(rows)
        list(workers.map(nothing, range(8)))
        ledger = Journal(study)
        start, before = time.perf_counter(), spent()
        with StageQueue(ledger, "encode", [(row, row["slide_id"]) for row in ledger.rows]) as shift:
            for mine in shift.rounds():
                for name, _ in workers.map(second, mine):
                    shift.finish(name, {"status": "encoded"})
        clock, cpu = time.perf_counter() - start, spent() - before
    ideal = TASKS / 2
    print(f"runner: {TASKS} slides of a second in two processes: {clock:.2f} s, {clock / ideal - 1:.2%} over", end="")
    print(f" ({cpu / TASKS * 1000:.1f} ms of the processor a slide)")


def of_processes() -> None:
    """Speed-up over processes: of spinning tasks, and of `histossl encode` shared by two runs."""
    from histossl.execution.workers import Workers

    one = 0.0
    for count in (1, 2, 4):
        with Workers(count) as workers:
            list(workers.map(nothing, range(4 * count)))
            start = time.perf_counter()
            taken = [answer for _, answer in workers.map(spin, range(24)) if isinstance(answer, float)]
            seconds = time.perf_counter() - start
        one = one or seconds
        print(f"{count} worker processes: {seconds:.1f} s ({sum(taken):.1f}), {one / seconds:.2f} times one")
    painted, seconds = paint(Path("out/benchmarks/scaling"), SLIDES), []
    for count in (1, 2):
        with tempfile.TemporaryDirectory() as out:
            ended(histossl("inspect", str(painted), "--out", out))
            flags = [
                "--encoder=random",
                "--encode.views=4",
                "--encode.precision=float32",
                "--workers=1",
                "--device=cpu",
            ]
            seconds.append(ended(*(histossl("encode", out, *flags) for _ in range(count)))[0])
    print(f"histossl encode: one run {seconds[0]:.1f} s, two {seconds[1]:.1f} s: {seconds[0] / seconds[1]:.2f} times")


def of_dask() -> None:
    """What a task costs on a Dask cluster of this machine."""
    try:
        from distributed import Client, LocalCluster
    except ImportError:
        print("Dask: is not installed")
        return
    from histossl.execution.cluster import Cluster

    with LocalCluster(2, threads_per_worker=1, dashboard_address=":0") as local, Client(local) as client:
        cluster = Cluster(client, timeout=60)
        list(cluster.map(nothing, range(50)))
        start, before = time.perf_counter(), spent()
        assert len(list(cluster.map(nothing, range(500)))) == 500
        clock, cpu = time.perf_counter() - start, spent() - before
    print(f"Dask: {clock / 500 * 1000:.1f} ms a task ({cpu / 500 * 1000:.1f})")


def of_training(slides: int = 0) -> None:
    """Steps of the slide encoder's training and its memory, of cohorts that are simulated by a few views on disk."""
    if not slides:
        with tempfile.TemporaryDirectory() as place:
            _write_views(Path(place) / "views")
            for count in (1_000, 10_000, 100_000, 1_000_000):
                here = {**os.environ, "VIEWS": place, "OMP_NUM_THREADS": "1"}
                subprocess.run([sys.executable, __file__, f"training={count}"], check=True, env=here)
        return
    import torch

    from histossl.gigassl.encoder import SlideEncoder
    from histossl.gigassl.pretrain_settings import PretrainSettings
    from histossl.gigassl.pretrain_task import NeighbourTask, draw_batch, draw_windows
    from histossl.study.folder import Study
    from histossl.study.pretrain_stage import SlideSources

    torch.set_num_threads(1)
    sources = SlideSources(Study(os.environ["VIEWS"]), [f"{k % 64}" for k in range(slides)])
    settings = PretrainSettings(batch=64)
    settings = replace(settings, encoder=replace(settings.encoder, in_dim=VIEWS[2]))
    task = NeighbourTask(SlideEncoder(settings.encoder))
    adam = torch.optim.Adam(task.parameters())
    start, before = time.perf_counter(), time.process_time()
    reading = 0.0
    for step in range(STEPS):
        begun = time.process_time()
        batch = draw_batch(step, -(-slides // settings.batch), sources, settings, draw_windows)
        reading += time.process_time() - begun
        loss, _ = task(batch)
        adam.zero_grad()
        loss.backward()
        adam.step()
    clock, cpu = (time.perf_counter() - start) / STEPS, (time.process_time() - before) / STEPS
    begun = time.process_time()
    for k in range(500):
        sources[k].load()
    opened = (time.process_time() - begun) / 500
    memory = Path("/proc/self/status").read_text()
    peak, anonymous = (int(re.findall(rf"{name}:\s+(\d+)", memory)[0]) / 1024 for name in ("VmHWM", "RssAnon"))
    print(
        f"training on {slides:,} slides: {clock:.2f} s ({cpu:.2f}) a step of {settings.batch}, "
        f"of which drawing {reading / STEPS:.2f}; {opened * 1e3:.2f} ms a slide at the start; "
        f"{peak:.0f} MiB at most, {anonymous:.0f} of them not views",
        flush=True,
    )


def _write_views(folder: Path) -> None:

    rng = np.random.default_rng(0)
    for k in range(64):
        place = folder / f"{k}"
        place.mkdir(parents=True)
        np.save(place / "features.npy", rng.standard_normal(VIEWS, np.float32).astype(np.float16))
        np.save(place / "coords.npy", rng.integers(0, 40, (*VIEWS[:2], 2)).astype(np.int32) * 448)
        fingerprints.write_made(place, "", stride_level0=448.0)


PARTS = {
    "slides": of_slides,
    "overhead": of_overhead,
    "processes": of_processes,
    "dask": of_dask,
    "training": of_training,
}

if __name__ == "__main__":
    for word in sys.argv[1:] or PARTS:
        name, _, count = word.partition("=")
        PARTS[name](*([int(count)] if count else []))
