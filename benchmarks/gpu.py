"""What a GPU gains, and whether it computes what the CPU computes: one run of under eight minutes.

    python benchmarks/gpu.py [--device cuda] [--seconds 4] [--tiles 256] [--slides SLIDE ...]

Prints one row a task: how often a second the CPU does it (float32), how often the device does it in float32 and in
bfloat16 where it multiplies that natively, with the ratios, and the greatest difference from the CPU beside its bound:

    encode        tiles of 224 px through ResNet-18 up to layer3, and visual words: features within 1e-3 of the largest
    vectors       slide vectors of 50 views: 1 - cosine within 1e-2
    steps         one optimiser step of every training: the first loss within 1e-3 of itself
    nuclei        a painted picture: of a thousand nuclei at most five without a partner (intersection over union .5)

Then, of a painted slide or of those given: tiles that one core reads a second, and how many cores keep the device busy.

The bounds are for float32; what bfloat16 differs by is printed beside it and must stay within ten times as much. Ends
with exit code 1 where a bound is exceeded. Without a GPU it says so; `--device cpu` then tries the script itself.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from histossl.core.console import say
from histossl.encoders.augment import TileAugmentSettings, draw_tile_augmentations
from histossl.encoders.forward import encode_tiles
from histossl.encoders.joint import Joint
from histossl.encoders.moco import MocoSettings, MocoTask
from histossl.encoders.resnet import IMAGENET_MEAN, IMAGENET_STD, ResNet18, fold_batch_norms
from histossl.encoders.tile_encoder import TileEncoder
from histossl.evaluate.mil import AttentionPool, BagTask
from histossl.gigassl.embed import EmbedSettings, embed_slide
from histossl.gigassl.encoder import SlideEncoder
from histossl.gigassl.encoder_settings import EncoderSettings
from histossl.gigassl.pretrain_settings import PretrainSettings
from histossl.gigassl.pretrain_task import NeighbourTask, PretrainTask
from histossl.gigassl.views import ViewSettings
from histossl.nuclei.instances import InstanceSettings, label_instances
from histossl.nuclei.metrics import score
from histossl.nuclei.network import NucleusNet
from histossl.nuclei.patch_sampling import PatchContrastSettings, PatchContrastTask
from histossl.nuclei.segmenter import load_method
from histossl.nuclei.self_training import SelfTraining, SelfTrainingTask
from histossl.nuclei.stain_survey import survey
from histossl.training.device import pick_dtype
from histossl.training.loop import Schedule, optimiser
from histossl.wsi.array_slide import picture_slide
from histossl.wsi.geometry import Region
from histossl.wsi.slide import open_slide
from histossl.wsi.synth import SynthSettings, paint_region, write_slide
from read_speed import PX, corners, cost

SLACK = 10  # what bfloat16 may differ by, in bounds of float32
Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: of the task.
        units: what a call handles, so many.
        made: (device, dtype) -> a call that does the task and returns its result.
        differs: of the CPU's result and the device's.
        bound: of the difference, in float32.
    """

    name: str
    units: int
    made: Callable[[torch.device, torch.dtype], Run]
    differs: Callable[[Any, Any], float]
    bound: float


def rate(call: Run, units: int, device: torch.device, seconds: float) -> float:
    """Units a second, over `seconds` of repetitions, after one call that does not count."""
    call()
    count, start = 0, time.perf_counter()
    while not count or time.perf_counter() < start + seconds:
        call()
        count += units
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return count / (time.perf_counter() - start)


def far(one: Tensor, other: Tensor) -> float:
    """The greatest difference, over the largest value."""
    return float((one - other).abs().max() / one.abs().max())


def loss_far(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs() / one.abs())


def turned(one: np.ndarray, other: np.ndarray) -> float:
    """1 - cosine."""
    return float(1 - one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def encoding(count: int) -> Iterator[Case]:
    tiles = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 224, 224, 3), np.uint8))

    def resnet(device: torch.device, dtype: torch.dtype) -> Run:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = fold_batch_norms(ResNet18()).to(device, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        encoder = TileEncoder({"name": "r"}, network, 256, IMAGENET_MEAN, IMAGENET_STD, dtype, device)
        return lambda: encode_tiles(encoder, tiles, None)

    def words(device: torch.device, dtype: torch.dtype) -> Run:
        joint = Joint(64, 4)
        joint.words.filters.normal_(generator=torch.Generator().manual_seed(0))
        joint.words.centres.normal_(generator=torch.Generator().manual_seed(1))
        encoder = TileEncoder({"name": "w"}, joint.to(device), joint.dim, (0, 0, 0), (1, 1, 1), torch.float32, device)
        return lambda: encode_tiles(encoder, tiles, None)

    yield Case("encode: ResNet-18, tiles", count, resnet, far, 1e-3)
    yield Case("encode: visual words, tiles", count, words, far, 1e-3)


def vectors() -> Iterator[Case]:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(5000, 384)).astype(np.float32)
    positions = np.stack(np.divmod(np.arange(5000), 80), 1).astype(np.float32)

    def made(device: torch.device, dtype: torch.dtype) -> Run:
        encoder = SlideEncoder(EncoderSettings(in_dim=384, prototypes=0, normalise=False)).to(device).eval()
        settings = EmbedSettings(50, precision=str(dtype).removeprefix("torch."))
        return lambda: embed_slide(encoder, features, positions, ViewSettings(), settings, "s")

    yield Case("vectors: slides of 50 views", 1, made, turned, 1e-2)


def step(task: nn.Module, batch: Any, device: torch.device, dtype: torch.dtype) -> Run:
    """An optimiser step; its first result is the loss before any."""
    task = task.to(device).train()
    adam = optimiser(task, Schedule(1, 1e-4, 0))

    def run() -> Tensor:
        given = apply_to_collection(batch, Tensor, Tensor.to, device=device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = task(given)[0]
        loss.backward()
        adam.step()
        adam.zero_grad(set_to_none=True)
        return loss.detach().float().cpu()

    return run


def trainings(slides: int) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    draw = torch.Generator().manual_seed(0)
    tiles, dim = 256, 256
    at = np.tile(np.stack(np.divmod(np.arange(tiles), 16), 1).astype(float), (2 * slides, 1))
    of = np.repeat(np.arange(2 * slides), tiles)
    views = torch.randn(len(of), dim, generator=draw), at, of, 2 * slides
    pictures = torch.randint(0, 256, (slides, 128, 128, 3), dtype=torch.uint8, generator=draw)
    drawn = [draw_tile_augmentations(TileAugmentSettings(), len(pictures), 128, rng) for _ in range(2)]
    crops, noise = torch.rand(8, 3, 128, 128, generator=draw), torch.rand(8, 3, 128, 128, generator=draw)
    patches = PatchContrastSettings(batch=4)
    fields = torch.rand(4, 3, patches.crop, patches.crop, generator=draw)
    places = torch.rand(2, 4, patches.channels, patches.places, generator=draw)
    plain = EncoderSettings(in_dim=dim, prototypes=0, normalise=False)
    truth = torch.arange(2 * slides) % 3
    batches: dict[str, tuple[Callable[[], nn.Module], Any]] = {
        f"slide encoder ({arch})": (
            lambda arch=arch: PretrainTask(PretrainSettings(encoder=replace(plain, arch=arch))),
            ((views,), slides),
        )
        for arch in ("sparse", "mlp", "attention")
    }
    neighbours = replace(plain, arch="neighbours")
    batches["slide encoder (neighbours)"] = (
        lambda: NeighbourTask(SlideEncoder(neighbours, seed=0)),
        ((views,), 2 * slides),
    )
    batches["momentum contrast"] = lambda: MocoTask(MocoSettings(batch=slides)), (pictures, *drawn)
    batches["self-training"] = lambda: SelfTrainingTask(NucleusNet()), (crops, noise)
    batches["patch contrast"] = lambda: PatchContrastTask(patches), (fields, places)
    batches["attention MIL"] = lambda: BagTask(AttentionPool(dim, 128), 128, torch.ones(3), 0.0), (*views, truth)
    for name, (task, batch) in batches.items():

        def made(device: torch.device, dtype: torch.dtype, task=task, batch=batch) -> Run:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return step(task(), batch, device, dtype)

        yield Case(f"step: {name}", 1, made, loss_far, 1e-3)


def nuclei(side: int) -> Iterator[Case]:
    picture = paint_region(SynthSettings(width=side, height=side, mpp=0.5), Region(0, 0, side, side))
    known = survey(picture_slide(picture, 0.5), 0.5)
    assert known.stains is not None
    stains, trained = known.stains, load_method("general", "cpu")
    assert isinstance(trained, SelfTraining)

    def made(device: torch.device, dtype: torch.dtype) -> Run:
        settings = replace(trained.settings, precision=str(dtype).removeprefix("torch."))
        method = SelfTraining(settings, trained.network, str(device))
        return lambda: method.confidence(picture, stains)

    def differ(one: np.ndarray, other: np.ndarray) -> float:
        labels = [label_instances(maps, 0.5, InstanceSettings(), True) for maps in (one, other)]
        return 1 - score(labels[1], labels[0]).f1  # the share of nuclei without a partner

    yield Case("nuclei: pictures", 1, made, differ, 5e-3)


def reading(paths: list[Path], most: dict[str, float]) -> None:
    """Print for every slide how many cores must read while the device encodes as fast as it can."""
    with tempfile.TemporaryDirectory() as folder:
        if not paths:
            paths = [Path(folder) / "painted.tiff"]
            write_slide(paths[0], SynthSettings(width=3000, height=3000, mpp=0.5))
        for path in paths:
            with open_slide(path, mpp_default=0.5) as slide:
                places = list(corners(slide.size.width, slide.size.height))

                def tile(x: int, y: int, slide=slide) -> np.ndarray:
                    return slide.read(Region(x, y, PX, PX), slide.mpp)

                core = 1000 / cost(tile, places)
            needed = ", ".join(f"{rate / core:.1f} for {name}" for name, rate in most.items())
            print(f"read: {path.name}: {core:.0f} tiles a second and core; cores that keep up: {needed}", flush=True)


def measured(case: Case, device: torch.device, seconds: float) -> tuple[bool, float]:
    """Print a row; whether the device computes what the CPU does, and its rate in the dtype that it is best at."""
    cpu = torch.device("cpu")
    call = case.made(cpu, torch.float32)
    truth = call()
    base = rate(call, case.units, cpu, seconds)
    row, good, fast = f"{case.name:32} {base:10.2f}", True, base
    dtypes = dict.fromkeys((torch.float32, pick_dtype("auto", device)))  # bfloat16 where the hardware multiplies it
    for dtype in dtypes:
        call = case.made(device, dtype)
        found = case.differs(truth, call())
        fast = rate(call, case.units, device, seconds)
        within = found <= case.bound * (1 if dtype == torch.float32 else SLACK)
        row += f" {fast:11.2f} {fast / base:7.2f} x {found:8.1e}{' ' if within else '!'}"
        good &= within
    print(f"{row}   {case.bound:.0e}", flush=True)
    return good, fast


def main() -> int:
    """Print the table; 1 where a bound is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=4.0, help="of repetitions behind each rate")
    parser.add_argument("--tiles", type=int, default=256, help="of a batch")
    parser.add_argument("--slides", type=Path, nargs="*", default=[], help="that are read; by default one is painted")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        say("torch sees no GPU here, so there is nothing to measure; `--device cpu` tries the script", "yellow")
        return 0
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU against itself"
    print(f"{name}; torch {torch.__version__}, {torch.get_num_threads()} threads on the CPU")
    head = "".join(f" {name:>11} {'ratio':>9} {'off':>8} " for name in ("float32", "bfloat16"))
    print(f"{'a second':32} {'CPU':>10}{head}   bound of off")
    cases = [
        *encoding(options.tiles),
        *vectors(),
        *trainings(max(4, options.tiles // 4)),
        *nuclei(max(256, 4 * options.tiles)),
    ]
    found = {case.name: measured(case, device, options.seconds) for case in cases}
    reading(options.slides, {name: rate for name, (_, rate) in found.items() if name.startswith("encode")})
    return not all(good for good, _ in found.values())


if __name__ == "__main__":
    raise SystemExit(main())
