"""A training whose process is killed, really and at random steps, ends with the bytes of one that was left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
import numpy as np
import torch
from support.features import SMALL, write_source
from histossl.gigassl.encoder_settings import EncoderSettings
from histossl.gigassl.pretrain import PretrainTask, pretrain_slides

out = Path(sys.argv[2])
rng = np.random.default_rng(0)
sources = [write_source(out, f"s{k}", rng) for k in range(6)]
SETTINGS = replace(SMALL, epochs=12, batch=4, patience=0.1, rate=0.03, encoder=EncoderSettings(dim=16))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def train(name, steps=None, saves=None):
    '''In a process of its own, which dies before its next step after `steps`, or with save number `saves` half done.'''
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    forward, save, done, saved = PretrainTask.forward, torch.save, [], []

    def step(task, batch):
        if len(done) == steps:
            die()
        done.append(1)
        return forward(task, batch)

    def write(*given):
        save(*given)
        saved.append(1)
        if len(saved) == saves:
            die()

    PretrainTask.forward, torch.save = step, write
    pretrain_slides(sources, SETTINGS, out / name / "enc", out / name / "logs", "f", "cpu")
    os._exit(0)


assert train("whole") == 0
chance = np.random.default_rng(7)
for kind in ("steps", "saves", "steps"):
    status = train("killed", **{kind: int(chance.integers(1, 7))})
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
assert train("killed") == 0
"""


def test_it_ends_with_the_same_bytes(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, tmp_path / "script.py", str(Path(__file__).parent), str(tmp_path)]
    run = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
    for name in ("enc/model.safetensors", "enc/config.json", "logs/log.csv"):
        whole, killed = ((tmp_path / place / name).read_bytes() for place in ("whole", "killed"))
        assert whole == killed, name
    assert not (tmp_path / "killed" / "logs" / "best.pt").exists()
