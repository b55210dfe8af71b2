"""A Dask cluster of two processes of this machine: the same bytes as here; a worker that dies costs its slide only."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from histossl.core import fingerprints
from histossl.core.embeddings import read_embeddings
from histossl.core.errors import SettingsError, SlideError
from histossl.execution.cluster import Cluster, open_workers
from histossl.execution.workers import ThreadExecutor, WorkerDied, WorkerHung, Workers


def task(item: int) -> int:
    if item == 2:
        raise SlideError("two.svs", "is no slide")
    if item == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return item * item


def test_here_answers_in_order_as_workers_do():
    answers = [(item, answer) for item, answer in ThreadExecutor().map(task, [1, 2, 3])]
    assert [item for item, _ in answers] == [1, 2, 3]
    assert (answers[0][1], answers[2][1]) == (1, 9)
    assert str(answers[1][1]) == "two.svs: is no slide"


def test_no_cluster_is_this_machine_and_two_are_too_many():
    assert isinstance(open_workers(3, 5.0, "", ""), Workers)
    with pytest.raises(SettingsError, match="two clusters"):
        open_workers(None, 5.0, "tcp://localhost:1", "3")


def hang(item: int) -> int:
    if item in (1, 2):
        threading.Event().wait()
    return item * item


def test_here_leaves_behind_what_hangs_and_goes_on():
    answers = dict(ThreadExecutor(timeout=0.3).map(hang, range(5)))
    assert list(answers) == list(range(5))
    assert all(isinstance(answers.pop(k), WorkerHung) for k in (1, 2))
    assert answers == {0: 0, 3: 9, 4: 16}


def test_a_task_that_hangs_on_a_cluster_is_given_up_and_its_worker_goes_on():
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, protocol="tcp", dashboard_address=None
        ) as local,
        distributed.Client(local) as client,
    ):
        answers = dict(Cluster(client, timeout=0.5).map(hang, range(5)))
    assert "no answer in 0.5 s" in str(answers.pop(1))
    assert isinstance(answers.pop(2), WorkerHung)
    assert answers == {0: 0, 3: 9, 4: 16}


def test_a_scheduler_that_goes_ends_the_run_and_no_slide_is_to_blame():
    distributed = pytest.importorskip("distributed")
    local = distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, protocol="tcp", dashboard_address=None
    )
    with distributed.Client(local) as client, pytest.raises(SettingsError, match="scheduler is lost"):
        for item, answer in Cluster(client).map(task, [0, 1, 3, 4]):
            assert answer == item * item
            local.close()


@pytest.mark.slow
def test_a_cluster_gives_the_same_bytes_and_outlives_its_workers(tmp_path):
    distributed = pytest.importorskip("distributed")
    from histossl.cli.main import main
    from histossl.wsi.synth import SynthSettings, write_slide

    for k in range(3):
        write_slide(tmp_path / "slides" / f"s{k}.tiff", SynthSettings(width=256, height=224 + 32 * k, seed=k))
    flags = ["--encoder=random", "--encode.views=2", "--encode.tiles=8", "--encode.batch=8", "--device=cpu"]
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as local:
        place = f"--scheduler={local.scheduler_address}"
        for out, where in (("there", place), ("here", "--workers=1")):
            study = str(tmp_path / out)
            assert main(["inspect", str(tmp_path / "slides"), "--out", study, "--tile.px=32", where]) == 0
            assert main(["encode", study, *flags, where]) == 0
            assert main(["pretrain", study, "--pretrain.epochs=1", "--pretrain.encoder.dim=16", "--device=cpu"]) == 0
            assert main(["embed", study, "--device=cpu", *([where] if out == "there" else [])]) == 0
        with distributed.Client(local) as client:
            answers = dict(Cluster(client).map(task, range(8)))
    for k in range(3):
        one, other = (tmp_path / out / "features" / f"s{k}.h5" for out in ("here", "there"))
        assert one.read_bytes() == other.read_bytes()
        views = [(tmp_path / out / "views" / f"s{k}" / "features.npy").read_bytes() for out in ("here", "there")]
        assert views[0] == views[1]
        assert fingerprints.fingerprint_of(one)
    here, there = (read_embeddings(tmp_path / out / "embeddings.h5ad") for out in ("here", "there"))
    assert list(here.slides.index) == list(there.slides.index) == ["s0", "s1", "s2"]
    assert list(here.vectors) == list(there.vectors)
    for name, vectors in here.vectors.items():
        np.testing.assert_array_equal(vectors, there.vectors[name])
    assert isinstance(answers.pop(5), WorkerDied)
    assert isinstance(answers.pop(2), SlideError)
    assert answers == {k: k * k for k in (0, 1, 3, 4, 6, 7)}


def test_slurm_jobs_are_asked_for_as_the_settings_say(tmp_path, monkeypatch):
    """A queue that only writes down what it is given."""
    jobqueue = pytest.importorskip("dask_jobqueue")
    dask = pytest.importorskip("dask")
    assert jobqueue
    sbatch: Path = tmp_path / "sbatch"
    sbatch.write_text(f'#!/bin/sh\ncat "$@" >> {tmp_path}/jobs; echo "Submitted batch job 7"\n')
    (tmp_path / "scancel").write_text("#!/bin/sh\n")
    for tool in ("sbatch", "scancel"):
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    about = {"cores": 2, "processes": 1, "memory": "4GB", "queue": "night", "walltime": "12:00:00", "interface": None}
    base = dask.config.get("jobqueue.slurm")
    with dask.config.set({"jobqueue.gpu": {**base, **about}}), open_workers(None, 5.0, "", "2:gpu") as cluster:
        assert cluster.count == 1  # no job has begun
        import time

        end = time.monotonic() + 120
        while not (tmp_path / "jobs").exists() or (tmp_path / "jobs").read_text().count("-p night") < 2:
            assert time.monotonic() < end
            time.sleep(0.1)
    with pytest.raises(SettingsError, match="not a number of jobs"):
        open_workers(None, 5.0, "", "many")
