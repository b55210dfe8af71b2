"""Slide vectors as we make them against the published way of working, and memory of all tiles in one pass.

    python benchmarks/embed_speed.py [--slides N] [--threads N] [--rounds N] [--memory-tiles N]

The network is the published one: 256 -> 512, four 3x3 convolutions. Every slide has 2,000 tiles at random on 80 x 80
places; its vector is the mean over R = 50 views of T = 5 tiles. Per slide, rounds of all rivals in turn, the least of
each, in seconds of the clock:

    ours          all views of a slide in one batch; float32, and 16-bit products where the processor has them
    one by one    the published loop on our own layers: a pass a view, kernel maps anew for each
    plain         the published loop on layers written plainly: a hash table of sites, and for each layer and each of
                  its nine offsets a look-up of every site, a gather, a product, a sum; float32
    dense         the published loop on dense convolutions over the smallest rectangle around the five tiles

The published code does the same loop on SparseConvNet, which needs a compiler and is not measured here.

Then, each in a process of its own, the peak memory of a slide of 100,000 tiles embedded in one pass (`views = 0`) over
the memory of its features: by the published network on 256 numbers a tile, by the default one, prototypes and all, on
1,536.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from histossl.gigassl.embed import EmbedSettings, embed_slide
from histossl.gigassl.encoder import SlideEncoder
from histossl.gigassl.encoder_settings import EncoderSettings
from histossl.gigassl.views import ViewSettings

TILES, SIDE, VIEWS, VIEW = 2000, 80, 50, ViewSettings(tiles=5, windows=0)
PUBLISHED = EncoderSettings(256, 512, "plain", tile_mean=False, prototypes=0, hard_border=True)
Slide = tuple[np.ndarray, np.ndarray]


def slides(count: int) -> list[Slide]:
    rng = np.random.default_rng(0)
    places = [rng.choice(SIDE * SIDE, TILES, replace=False) for _ in range(count)]
    at = [np.stack(np.divmod(chosen, SIDE), 1).astype(np.float32) for chosen in places]
    return [(rng.normal(size=(TILES, 256)).astype(np.float32), positions) for positions in at]


def ours(encoder: SlideEncoder, cohort: list[Slide], precision: str) -> Callable[[], object]:
    settings = EmbedSettings(VIEWS, precision=precision)
    return lambda: [embed_slide(encoder, f, p, VIEW, settings, str(k)) for k, (f, p) in enumerate(cohort)]


def loop(cohort: list[Slide], look: Callable[[Tensor, np.ndarray], Tensor]) -> Callable[[], object]:
    """The published way: for every slide, R times, five tiles through the network; then the mean."""

    @torch.inference_mode()
    def run() -> None:
        rng = np.random.default_rng(0)
        for features, positions in cohort:
            total = torch.zeros(512)
            for _ in range(VIEWS):
                chosen = rng.choice(len(features), VIEW.tiles, replace=False)
                at = positions[chosen] - positions[chosen].min(0)
                total += look(torch.from_numpy(features[chosen]), at)
            F.normalize(total, dim=0)

    return run


def one_by_one(encoder: SlideEncoder) -> Callable[[Tensor, np.ndarray], Tensor]:
    return lambda tiles, at: encoder(tiles, at, np.zeros(len(tiles), np.int64), 1)[0]


class Plain:
    """The stage of an encoder, a hash table of sites and an offset at a time."""

    def __init__(self, encoder: SlideEncoder) -> None:
        self.blocks = list(encoder.stage.blocks)

    def __call__(self, tiles: Tensor, at: np.ndarray) -> Tensor:
        sites, rows = [tuple(place) for place in at.astype(int).tolist()], tiles
        for block, stride in zip(self.blocks, (2, 1), strict=True):
            targets = self.strided(sites) if stride == 2 else sites
            inner = torch.relu(block.bn1(self.convolve(rows, sites, targets, stride, block.conv1.weight[:, 0])))
            inner = block.bn2(self.convolve(inner, targets, targets, 1, block.conv2.weight[:, 0]))
            if stride == 2:
                ones = torch.ones(9, 1) / 9
                short = self.convolve(rows, sites, targets, 2, ones)
                rows = block.shortcut_bn(short @ block.shortcut.weight[0, 0])
            rows, sites = torch.relu(inner + rows), targets
        return rows.mean(0)

    @staticmethod
    def strided(sites: list[tuple[int, int]]) -> list[tuple[int, int]]:
        found = {}
        for r, c in sites:
            for dy in range(3):
                for dx in range(3):
                    if r >= dy and c >= dx and (r - dy) % 2 == 0 and (c - dx) % 2 == 0:
                        found[(r - dy) // 2, (c - dx) // 2] = None
        return list(found)

    @staticmethod
    def convolve(rows: Tensor, sites: list, targets: list, stride: int, weight: Tensor) -> Tensor:
        table, shift = {site: k for k, site in enumerate(sites)}, 0 if stride == 2 else 1
        out = torch.zeros(len(targets), rows.shape[1] if weight.ndim == 2 else weight.shape[2])
        for dy in range(3):
            for dx in range(3):
                pairs = [
                    (table.get((stride * r + dy - shift, stride * c + dx - shift)), k)
                    for k, (r, c) in enumerate(targets)
                ]
                source = [s for s, _ in pairs if s is not None]
                if source:
                    w = weight[3 * dy + dx]
                    found = rows[source] * w if weight.ndim == 2 else rows[source] @ w
                    out.index_add_(0, torch.tensor([k for s, k in pairs if s is not None]), found)
        return out


class Dense:
    """The same network as dense convolutions over the rectangle around the tiles; the mean is over all of it."""

    def __init__(self, encoder: SlideEncoder) -> None:
        self.blocks = list(encoder.stage.blocks)
        self.kernels = [
            [
                conv.weight.squeeze(1).reshape(3, 3, *conv.weight.shape[2:]).permute(3, 2, 0, 1).contiguous()
                for conv in two
            ]
            for two in ((block.conv1, block.conv2) for block in self.blocks)
        ]

    def __call__(self, tiles: Tensor, at: np.ndarray) -> Tensor:
        places = at.astype(int)
        height, width = (places.max(0) + 3).tolist()
        x = torch.zeros(1, tiles.shape[1], height, width)
        x[0, :, places[:, 0], places[:, 1]] = tiles.T
        for block, (first, second), stride in zip(self.blocks, self.kernels, (2, 1), strict=True):
            inner = torch.relu(norm(block.bn1, F.conv2d(x, first, stride=stride, padding=2 - stride)))
            inner = norm(block.bn2, F.conv2d(inner, second, padding=1))
            if stride == 2:
                x = norm(
                    block.shortcut_bn, F.conv2d(F.avg_pool2d(x, 3, 2), block.shortcut.weight[0, 0].T[..., None, None])
                )
            x = torch.relu(inner + x)
        return x.mean((0, 2, 3))


def norm(layer: torch.nn.Module, x: Tensor) -> Tensor:
    parts = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    return F.batch_norm(x, *parts, eps=layer.eps)  # type: ignore[arg-type]


def peak(tiles: int, dim: int) -> float:
    """MiB at the peak of embedding one slide of so many tiles in one pass, in a process of its own."""
    command = [sys.executable, __file__, "--one-slide", str(tiles), str(dim)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def one_slide(tiles: int, dim: int) -> None:
    rng = np.random.default_rng(0)
    positions = np.stack(np.divmod(np.arange(tiles), 320), 1).astype(np.float32)
    features = rng.standard_normal((tiles, dim), np.float32)
    network = PUBLISHED if dim == PUBLISHED.in_dim else EncoderSettings(dim)
    embed_slide(SlideEncoder(network).eval(), features, positions, VIEW, EmbedSettings(0), "one")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-tiles", type=int, default=100_000)
    parser.add_argument("--one-slide", type=int, nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one_slide:
        one_slide(*chosen.one_slide)
        return
    torch.set_num_threads(chosen.threads)
    encoder, cohort = SlideEncoder(PUBLISHED).eval(), slides(chosen.slides)
    at = np.array([[0, 0], [3, 5], [4, 5], [9, 2], [3, 5]], np.float32)
    tiles = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():  # one rival that computes something else would be none
        torch.testing.assert_close(Plain(encoder)(tiles[:4], at[:4]), one_by_one(encoder)(tiles[:4], at[:4]))
    rivals = {
        "ours, float32": ours(encoder, cohort, "float32"),
        "ours, auto": ours(encoder, cohort, "auto"),
        "one by one": loop(cohort, one_by_one(encoder)),
        "plain": loop(cohort, Plain(encoder)),
        "dense": loop(cohort[:1], Dense(encoder)),
    }
    best = dict.fromkeys(rivals, float("inf"))
    for turn in range(chosen.rounds + 1):
        for name, run in rivals.items():
            if name == "dense" and turn != 1:  # half a minute each
                continue
            start = time.perf_counter()
            run()
            if turn:
                best[name] = min(best[name], (time.perf_counter() - start) / (1 if name == "dense" else len(cohort)))
    print(f"torch {torch.__version__}, {chosen.threads} threads, {torch.backends.cpu.get_cpu_capability()}")
    print("rival            ms a slide   over ours, float32   over ours, auto")
    for name, seconds in best.items():
        ratios = [seconds / best[mine] for mine in ("ours, float32", "ours, auto")]
        print(f"{name:<15} {seconds * 1e3:>11.1f} {ratios[0]:>20.1f} {ratios[1]:>17.1f}", flush=True)
    for dim in (PUBLISHED.in_dim, 1536):
        small, large = peak(1000, dim), peak(chosen.memory_tiles, dim)
        held = chosen.memory_tiles * dim * 4 / 2**20
        print(f"one pass over {chosen.memory_tiles:,} tiles of {dim} numbers: {large:.0f} MiB at the peak, of which")
        print(f"{large - small:.0f} MiB more than over 1,000 tiles: {(large - small) / held:.1f} times their features")


if __name__ == "__main__":
    main()
