"""Runs a tile encoder on a batch; on a CPU, each core takes a few tiles at a time."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from histossl.encoders.augment import Augmentation, augment, to_float
from histossl.encoders.tile_encoder import TileEncoder
from histossl.training.device import sent

CACHE_PIXELS = 8 * 224 * 224  # pixels per core and call: few enough that their feature maps stay in the cache


def encode_tiles(encoder: TileEncoder, tiles: Tensor, t: Augmentation | None) -> Tensor:
    """Encode a batch of tiles.

    Args:
        encoder: of tiles.
        tiles: (B, H, W, 3) uint8, on the CPU.
        t: an augmentation of all tiles; None encodes them unchanged.

    Returns:
        (B, dim) float32, on the CPU.
    """

    def few(part: Tensor) -> Tensor:
        with torch.inference_mode():
            part = sent(part, encoder.device)
            return encoder(to_float(part, encoder.dtype) if t is None else augment(part, t, encoder.dtype))

    if encoder.device.type == "cuda":
        return few(tiles)
    # On a CPU, small parts whose feature maps stay in the cache save a quarter of the time.
    cores = torch.get_num_threads()
    part = min(CACHE_PIXELS // (tiles.shape[1] * tiles.shape[2]), -(-len(tiles) // cores))
    return torch.cat(list(_threads(cores).map(few, tiles.split(max(1, part)))))


@functools.lru_cache(maxsize=1)
def _threads(count: int) -> ThreadPoolExecutor:
    """Threads that compute on one core each.

    Torch's own threads share each layer and wait for each other after it; where reading workers use the same cores,
    that costs up to a sixth of the time.
    """
    # The barrier makes every thread start, so that each one runs its initialiser now.
    pool, together = ThreadPoolExecutor(count, "encode", torch.set_num_threads, (1,)), threading.Barrier(count)
    list(pool.map(lambda _: together.wait(), range(count)))
    torch.set_num_threads(count)  # the initialisers also changed the default of threads that start later
    return pool
