"""Several processes are one: real processes, met by torchrun, give the loss and the gradients of one."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from histossl.core.errors import TrainingError
from histossl.gigassl import pretrain_task
from histossl.gigassl.encoder_settings import EncoderSettings
from histossl.gigassl.pretrain import pretrain_slides
from histossl.gigassl.pretrain_settings import PretrainSettings
from histossl.gigassl.pretrain_task import PretrainTask
from histossl.gigassl.slide_sources import SlideSource
from histossl.gigassl.towers import Towers, draw_across, match
from histossl.training.distributed import gather, make_fabric, moments, rank_counts
from support.features import SMALL, write_source

SLIDES = 7  # no multiple of the processes
NARROW = replace(SMALL, epochs=3, batch=SLIDES, encoder=EncoderSettings(dim=48))


def sources_in(folder: Path) -> list[SlideSource]:
    return [SlideSource(f"s{k}", folder / f"s{k}.h5", folder / f"s{k}") for k in range(SLIDES)]


def first_step(folder: Path, settings: PretrainSettings, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Loss, gauges, gradients and running statistics of one step, of as many processes as there are."""
    task = PretrainTask(replace(settings, encoder=replace(settings.encoder, in_dim=32))).to(dtype)
    fabric = make_fabric("cpu", "64-true" if dtype == torch.float64 else "32-true")
    model = fabric.setup_module(task)
    loss, gauges = model(pretrain_task.draw_batch(0, 1, sources_in(folder), settings))
    fabric.backward(loss)
    found = {"loss": loss.detach(), **gauges, **task.measure()}
    found |= {f"gradient {name}": p.grad.clone() for name, p in task.named_parameters()}
    return found | {name: b.clone() for name, b in task.named_buffers() if "running" in name}


def towers_step(folder: Path, settings: PretrainSettings) -> dict[str, torch.Tensor]:
    """As `first_step`, of two sources: slides 0 to 4 are in the one, 2 to 6 in the other."""
    sources = sources_in(folder)
    towers = Towers([replace(settings.encoder, in_dim=32)] * 2, settings.seed)
    task = PretrainTask(settings, towers, towers.contrasted_dim).double()
    model = make_fabric("cpu", "64-true").setup_module(task)
    shown = match([sources[:5], sources[2:]])
    loss, gauges = model(pretrain_task.draw_batch(0, 1, shown, settings, draw_across))
    loss.backward()
    found = {"loss": loss.detach(), **gauges} | {f"gradient {n}": p.grad.clone() for n, p in task.named_parameters()}
    return found | {name: b.clone() for name, b in task.named_buffers() if "running" in name}


CHUNKED = replace(NARROW, chunk=2)
SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
import torch
from test_distributed import CHUNKED, NARROW, first_step, sources_in, towers_step
from histossl.training import distributed as parallel
from histossl.gigassl.pretrain import pretrain_slides
folder, out = Path(sys.argv[2]), Path(sys.argv[3])
with parallel.process_group("cpu") as first:
    found = {
        "double": first_step(folder, NARROW),
        "single": first_step(folder, NARROW, torch.float32),
        "chunked": first_step(folder, CHUNKED),
        "towers": towers_step(folder, NARROW),
        "towers in chunks": towers_step(folder, CHUNKED),
    }
    torch.save(found, out / f"rank{parallel.rank_and_world_size()[0]}.pt")
    parallel.barrier()
    pretrain_slides(sources_in(folder), NARROW, out / "enc", out / "logs", "f", "cpu")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    rng = np.random.default_rng(0)
    for k in range(SLIDES):
        write_source(folder, f"s{k}", rng)
    return folder


@pytest.fixture(scope="module")
def two(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("two")
    (out / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", out / "script.py"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([*command, str(Path(__file__).parent), str(folder), str(out)], env=env, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
    return out


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        scale = max(1.0, float(value.abs().max()))
        difference = float((found[name].double() - value.double()).abs().max()) / scale
        gauge = name in ("spread", "matched", "alignment", "uniformity", "effective_rank")  # always in float32
        assert difference < (max(tolerance, 1e-6) if gauge else tolerance), (name, difference)


def test_two_processes_with_half_the_batch_are_one_with_the_whole(folder, two):
    one = {
        name: first_step(folder, NARROW, dtype)
        for name, dtype in (("double", torch.float64), ("single", torch.float32))
    }
    for rank in (0, 1):
        found = torch.load(two / f"rank{rank}.pt")
        same(found["double"], one["double"], 1e-9)
        same(found["single"], one["single"], 1e-5)
    assert one["double"]["gradient encoder.stage.blocks.0.conv1.weight"].abs().max() > 1e-4


@pytest.mark.slow
def test_two_machines_are_one(folder, tmp_path):
    """As torchrun starts them, one on each machine; here the two are this one."""
    script = SCRIPT.partition("    parallel.barrier()")[0].replace("NARROW, torch.float32", "NARROW")
    (tmp_path / "script.py").write_text(script)
    common = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    common += ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    mine = [tmp_path / "script.py", str(Path(__file__).parent), str(folder), str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    nodes = [subprocess.Popen([*common, f"--node-rank={rank}", *mine], env=env) for rank in (0, 1)]
    assert [node.wait() for node in nodes] == [0, 0]
    one = first_step(folder, NARROW)
    for rank in (0, 1):
        same(torch.load(tmp_path / f"rank{rank}.pt")["double"], one, 1e-9)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_chunks_of_two_processes_are_the_chunks_of_one(folder, two):
    # Two of each process's slides at a time are four of the batch.
    one = first_step(folder, replace(CHUNKED, chunk=4))
    for rank in (0, 1):
        same(torch.load(two / f"rank{rank}.pt")["chunked"], one, 1e-9)


def test_two_processes_with_two_sources_are_one(folder, two):
    one, chunked = towers_step(folder, NARROW), towers_step(folder, replace(CHUNKED, chunk=4))
    for rank in (0, 1):
        found = torch.load(two / f"rank{rank}.pt")
        same(found["towers"], one, 1e-9)
        same(found["towers in chunks"], chunked, 1e-9)
    assert one["gradient encoder.each.1.linear.weight"].abs().max() > 1e-4


def test_two_processes_train_as_one_and_one_of_them_writes(folder, two, tmp_path):
    pretrain_slides(sources_in(folder), NARROW, tmp_path / "enc", tmp_path / "logs", "f", "cpu")
    logs = []
    for out in (tmp_path, two):
        with (out / "logs" / "log.csv").open() as file:
            logs.append(list(csv.DictReader(file)))
    assert len(logs[0]) == len(logs[1]) == 3
    for one, other in zip(*logs, strict=True):
        for name in one:
            assert float(other[name]) == pytest.approx(float(one[name]), rel=2e-3, abs=2e-3), name
    assert float(logs[1][0]["loss"]) == pytest.approx(float(logs[0][0]["loss"]), rel=1e-5)
    assert len(list((two / "logs" / "tensorboard").iterdir())) == 1
    assert not list(two.rglob("*.part*"))


def as_if_of(processes: int, monkeypatch, rank: int = 0) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", processes), ("LOCAL_WORLD_SIZE", processes)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")


def test_more_processes_than_slides_of_a_batch_are_refused(folder, tmp_path, monkeypatch):
    as_if_of(8, monkeypatch)
    with pytest.raises(TrainingError, match="8 processes for batches of 7 slides"):
        pretrain_slides(sources_in(folder), NARROW, tmp_path / "enc", tmp_path / "logs", "f", "cpu")


@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_processes_share_the_pairs_of_one(folder, monkeypatch, chunk):
    settings, sources = replace(NARROW, chunk=chunk), sources_in(folder)
    ((features, _, views, size),), pairs = pretrain_task.draw_batch(0, 1, sources, NARROW)
    whole = {features[views == v].numpy().tobytes() for v in range(size)}
    found, counts = [], set()
    for rank in range(3):
        as_if_of(3, monkeypatch, rank)
        chunks, total = pretrain_task.draw_batch(0, 1, sources, settings)
        assert total == pairs == SLIDES
        assert sum(c[3] for c in chunks) == 2 * rank_counts(total)[rank]
        counts.add(len(chunks))
        found += [f[v == k].numpy().tobytes() for f, _, v, n in chunks for k in range(n)]
    assert len(found) == size
    assert set(found) == whole
    assert len(counts) == 1  # they meet in every chunk
    assert counts == {1 if not chunk else -(-2 // chunk)}


def test_a_process_alone_gathers_its_own():
    rows = torch.randn(3, 2)
    assert gather(rows, [3]) is rows
    assert rank_counts(5) == [5]
    with pytest.raises((RuntimeError, ValueError)):
        moments(rows)


def test_chunks_give_the_gradient_of_the_whole_batch(folder):
    """Against all chunks in one graph; and, where batch norms use fixed statistics, against one pass of the batch."""
    batch, _ = pretrain_task.draw_batch(0, 1, sources_in(folder), CHUNKED)
    whole, _ = pretrain_task.draw_batch(0, 1, sources_in(folder), NARROW)
    assert len(batch) > 2

    def step(chunks, frozen=False):
        task = PretrainTask(replace(NARROW, encoder=replace(NARROW.encoder, in_dim=32))).double()
        if frozen:
            for norm in (m for m in task.encoder.modules() if isinstance(m, nn.BatchNorm1d)):
                norm.eval()
        loss, _ = task((chunks, SLIDES))
        loss.backward()
        return {"loss": loss.detach(), **{n: p.grad for n, p in task.named_parameters()}} | {
            name: b for name, b in task.named_buffers() if "running" in name
        }

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain_task, "encode_twice", lambda encoder, *chunk: encoder(*chunk))
        kept = step(batch)
    same(step(batch), kept, 1e-12)
    same(step(batch, frozen=True), step(whole, frozen=True), 1e-9)
