"""What nuclei cost, step by step, as ratios to the network's multiplications done as one matrix product.

python benchmarks/nuclei_speed.py [--side 1000] [--threads 2]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from histossl.nuclei.export import write_geojson
from histossl.nuclei.instances import InstanceSettings, Nuclei, nuclei_of_tile
from histossl.nuclei.network import NucleusNet
from histossl.nuclei.patch_sampling import PatchContrastSettings, PatchContrastTask
from histossl.nuclei.self_training import Batches, Sample, SelfTraining, SelfTrainingTask
from histossl.nuclei.settings import SelfTrainingSettings
from histossl.nuclei.stain_survey import survey
from histossl.nuclei.threshold import Prior
from histossl.wsi.array_slide import picture_slide
from histossl.wsi.geometry import Region
from histossl.wsi.synth import SynthSettings, paint_region


def best(call: Callable[[], object], times: int = 3) -> float:
    """Seconds of the fastest of several calls, after one that does not count."""
    call()
    spans = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        spans.append(time.perf_counter() - start)
    return min(spans)


def multiplications(network: nn.Module, pixels: int) -> float:
    """Of one pass of the network over so many pixels of its input."""
    total = 0.0

    def count(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            nonlocal total
            total += output[0, 0].numel() * module.weight.numel()

    hooks = [module.register_forward_hook(count) for module in network.modules()]
    with torch.inference_mode():
        network.eval()(torch.zeros(1, 3, 64, 64))
    for hook in hooks:
        hook.remove()
    return total * pixels / 64**2


def main() -> None:
    """Print a table: ms a megapixel of 0.25 µm, and the ratio to the GEMM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", type=int, default=1000, help="pixels at 0.25 µm")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    side = options.side
    settings = SynthSettings(width=side, height=side, mpp=0.25)
    picture = paint_region(settings, Region(0, 0, side, side))
    slide = picture_slide(picture, 0.25)
    known = survey(slide, 0.5)
    assert known.stains is not None
    stains = known.stains
    rgb = slide.read(Region.whole(slide.size), 0.5)
    method = SelfTraining(SelfTrainingSettings(), NucleusNet())
    prior = Prior()
    context = prior.prepare(known.fields, stains)
    found = prior.confidence(rgb, stains, context)
    confidence = (np.stack([found[0], found[1]]) * 255).astype(np.uint8)
    core = (0, 0, rgb.shape[1], rgb.shape[0])

    def parted() -> Nuclei:
        return nuclei_of_tile(rgb, confidence, stains, 0.5, InstanceSettings(), core, True)

    nuclei = parted()
    macs = multiplications(NucleusNet(), rgb.shape[0] * rgb.shape[1])
    a, b = torch.zeros(4096, 288, dtype=method.dtype), torch.zeros(288, 32, dtype=method.dtype)
    gemm = best(lambda: a @ b) * macs / (4096 * 288 * 32)
    task = SelfTrainingTask(NucleusNet()).train()
    batches = Batches([Sample(known.fields, stains)], SelfTrainingSettings())
    batch = batches(0)

    def step(whole: bool) -> None:
        with torch.autocast("cpu", method.dtype, enabled=method.dtype == torch.bfloat16):
            loss = task(batches(1))[0] if whole else task.network(batch[0]).float().mean()
        loss.backward()

    with tempfile.TemporaryDirectory() as folder:
        rows = {
            "network's multiplications as one GEMM": gemm,
            "confidence (network, 2 turns)": best(lambda: method.confidence(rgb, stains)),
            "part, outline, measure": best(
                lambda: nuclei_of_tile(rgb, confidence, stains, 0.5, InstanceSettings(), core, True)
            ),
            "GeoJSON": best(lambda: write_geojson(Path(folder) / "a.geojson", [nuclei], 0.25)),
            "stains and sample": best(lambda: survey(slide, 0.5)),
        }
    megapixels = side**2 / 1e6
    print(f"{len(nuclei)} nuclei, {megapixels:.2f} megapixels of 0.25 µm, {options.threads} threads, {method.dtype}")
    for name, seconds in rows.items():
        print(f"{name:40} {1000 * seconds / megapixels:8.1f} ms/MP   {seconds / gemm:7.1f} x GEMM")
    paper = PatchContrastTask(PatchContrastSettings()).train()
    crops = torch.rand(PatchContrastSettings().batch, 3, PatchContrastSettings().crop, PatchContrastSettings().crop)
    drawn = torch.rand(2, len(crops), PatchContrastSettings().channels, PatchContrastSettings().places)
    steps = {
        "training step of self-training": (lambda: step(True), lambda: step(False)),
        "training step of paper": (
            lambda: paper((crops, drawn))[0].backward(),
            lambda: paper.network(crops).mean().backward(),
        ),
    }
    for name, (entire, network) in steps.items():
        whole, bare = best(entire), best(network)
        print(f"{name:40} {1000 * whole:8.1f} ms      {whole / bare:7.2f} x the network's forward and backward alone")


if __name__ == "__main__":
    main()
