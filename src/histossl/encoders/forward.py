"""Tiles through an encoder, on a CPU a few at a time on each core."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from histossl.encoders.augment import Augmentation, augment, to_float
from histossl.encoders.tile_encoder import TileEncoder

CACHE_PIXELS = 8 * 224 * 224  # that pass at once on a core


def encode_tiles(encoder: TileEncoder, tiles: Tensor, t: Augmentation | None) -> Tensor:
    """(B, H, W, 3) uint8 tiles -> (B, dim) float32 features, under an augmentation or as they are."""

    def few(part: Tensor) -> Tensor:
        with torch.inference_mode():
            part = part.to(encoder.device, non_blocking=True)
            return encoder(to_float(part, encoder.dtype) if t is None else augment(part, t, encoder.dtype))

    if encoder.device.type == "cuda":
        return few(tiles)
    # On a CPU a few tiles at a time: their maps stay in the cache, which is worth a quarter of the time.
    cores = torch.get_num_threads()
    part = min(CACHE_PIXELS // (tiles.shape[1] * tiles.shape[2]), -(-len(tiles) // cores))
    return torch.cat(list(_threads(cores).map(few, tiles.split(max(1, part)))))


@functools.lru_cache(maxsize=1)
def _threads(count: int) -> ThreadPoolExecutor:
    """Threads that compute on one core each.

    Those that share a layer wait for each other after every one, which is long where workers that read take turns with
    them: up to a sixth of the time.
    """
    pool, together = ThreadPoolExecutor(count, "encode", torch.set_num_threads, (1,)), threading.Barrier(count)
    list(pool.map(lambda _: together.wait(), range(count)))
    torch.set_num_threads(count)  # what a thread sets for itself, those begun later take over
    return pool
