"""The sparse stage against the matrix products that it cannot do without, and against the dense network.

    python benchmarks/sparse_speed.py [--threads N] [--repeats N]

Forward and backward of the four 3x3 convolutions of the slide encoder's stage (256 -> 512, stride 2; three times
512 -> 512), gradients of the input too. Per case, in one run, rounds of all rivals in turn, the least of each:

    products      rows times matrices, forward: the pairs of all four convolutions
    bound         the very same multiplications as bare float32 matrix products on factors that lie ready
    float32       ours, as a ratio to the bound; bfloat16: ours under autocast, as a ratio to the same float32 bound
    stage         the whole stage in bfloat16, with batch norm, ReLU, pool and shortcut: ratio to the bound
    maps          building all kernel maps, as a share of the bfloat16 and of the float32 step
    dense         dense conv2d's on the whole 80 x 80 map, float32, over ours in float32 and in bfloat16; timed on
                  few views and scaled to all
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from histossl.gigassl.layers import Stage
from histossl.gigassl.sparse import Grid, KernelMap, SparseMap, sparse_conv

SIDE = 80
WIDTHS = ((256, 512), (512, 512), (512, 512), (512, 512))
DENSE_VIEWS = 4


def random_maps(views: int, tiles: int, rng: np.random.Generator) -> np.ndarray:
    """(views * tiles, 3) sites, each view's at random on the 80 x 80 map."""
    flat = np.stack([np.sort(rng.choice(SIDE * SIDE, tiles, replace=False)) for _ in range(views)])
    return np.stack([np.repeat(np.arange(views), tiles), flat.ravel() // SIDE, flat.ravel() % SIDE], 1)


def cases(rng: np.random.Generator) -> dict[str, tuple[np.ndarray, int, bool]]:
    """name -> (sites, views, whether the map is sparse)."""
    full = np.stack(np.meshgrid([0], np.arange(80), np.arange(100), indexing="ij"), -1).reshape(-1, 3)
    found = {f"{v} x {t}": (random_maps(v, t, rng), v, True) for v, t in ((512, 5), (128, 64), (64, 256))}
    return {**found, "one map of 8,000": (full, 1, False)}


def maps(sites: np.ndarray, views: int) -> tuple[Grid, list[KernelMap]]:
    grid = Grid(sites, views)
    coarse, down = grid.strided
    return grid, [down, *[coarse.neighbours] * 3]


def bound(kernels: list[KernelMap]) -> Callable[[], None]:
    """Bare products of the same multiplications: out = x w, dx = g w', dw = x' g, a layer at a time."""
    layers = []
    for kernel, (inputs, outputs) in zip(kernels, WIDTHS, strict=True):
        x, w, g = (
            torch.randn(kernel.products, inputs),
            torch.randn(inputs, outputs),
            torch.randn(kernel.products, outputs),
        )
        layers.append((x, w, g, torch.empty_like(g), torch.empty_like(x), torch.empty_like(w)))

    def run() -> None:
        for x, w, g, out, dx, dw in layers:
            torch.mm(x, w, out=out)
            torch.mm(g, w.t(), out=dx)
            torch.mm(x.t(), g, out=dw)

    return run


def ours(grid: Grid, kernels: list[KernelMap], bf16: bool) -> Callable[[], None]:
    x = torch.randn(len(grid), 256, requires_grad=True)
    weights = [(torch.randn(9, i, o) * 0.02).requires_grad_() for i, o in WIDTHS]
    upstream = torch.randn(kernels[-1].outputs, 512)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            rows: Tensor = x
            for weight, kernel in zip(weights, kernels, strict=True):
                rows = sparse_conv(rows, weight, kernel)
        torch.autograd.grad(rows, [x, *weights], upstream)

    return run


def whole_stage(grid: Grid) -> Callable[[], None]:
    stage, x = Stage(256, 512, spatial=True), torch.randn(len(grid), 256, requires_grad=True)
    parameters = [x, *stage.parameters()]

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            out = stage(SparseMap(x, grid)).mean()
        torch.autograd.grad(out, parameters, torch.ones_like(out))

    return run


def dense(views: int, columns: int) -> Callable[[], None]:
    convs = [nn.Conv2d(i, o, 3, 2 - (i == o), padding=int(i == o), bias=False) for i, o in WIDTHS]
    network = nn.Sequential(*convs)
    x = torch.randn(views, 256, SIDE, columns, requires_grad=True)

    def run() -> None:
        out = network(x)
        torch.autograd.grad(out, [x, *network.parameters()], torch.ones_like(out))

    return run


def least(rivals: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds, the least of `repeats` rounds in which each rival runs once; after one round that does not count."""
    best = dict.fromkeys(rivals, float("inf"))
    for turn in range(repeats + 1):
        for name, run in rivals.items():
            start = time.perf_counter()
            run()
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def measure(sites: np.ndarray, views: int, sparse: bool, repeats: int) -> str:
    grid, kernels = maps(sites, views)
    shown = min(views, DENSE_VIEWS)
    t = least(
        {
            "bound": bound(kernels),
            "float32": ours(grid, kernels, False),
            "bfloat16": ours(grid, kernels, True),
            "stage": whole_stage(grid),
            "maps": lambda: maps(sites, views),
        },
        repeats,
    )
    slow = least({"dense": dense(shown, SIDE if sparse else 100)}, 1)["dense"] * views / shown
    products, floor = sum(kernel.products for kernel in kernels), t["bound"]
    ratios = [t[name] / floor for name in ("float32", "bfloat16", "stage")]
    shares = [t["maps"] / (t["maps"] + t[name]) for name in ("bfloat16", "float32")]
    gains = [slow / t[name] for name in ("float32", "bfloat16")]
    return (
        f"{products:>9,} {floor * 1e3:>8.0f} ms {ratios[0]:>8.2f} {ratios[1]:>9.2f} {ratios[2]:>6.2f}"
        f" {shares[0]:>6.1%} {shares[1]:>5.1%} {gains[0]:>7.1f} {gains[1]:>6.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    print(f"torch {torch.__version__}, {chosen.threads} threads, {torch.backends.cpu.get_cpu_capability()}")
    print("case               products       bound  float32  bfloat16  stage   maps (16, 32)  dense (32, 16)")
    for name, (sites, views, sparse) in cases(np.random.default_rng(0)).items():
        print(f"{name:<17}", measure(sites, views, sparse, chosen.repeats), flush=True)


if __name__ == "__main__":
    main()
