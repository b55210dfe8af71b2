"""Encodes a slide: writes the features of all of its tiles, and K augmented views of n of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from histossl.core import atomic, fingerprints, hdf5
from histossl.core.config import fingerprint, number_of
from histossl.core.errors import SlideError
from histossl.encoders.augment import Augmentation, draw_augmentation
from histossl.encoders.forward import encode_tiles
from histossl.encoders.settings import EncodeSettings
from histossl.encoders.tile_choice import choose_tiles
from histossl.encoders.tile_encoder import TileEncoder
from histossl.wsi import tile_files
from histossl.wsi.artefacts import judge, together, with_pixels
from histossl.wsi.slide import slide_state
from histossl.wsi.stain_norm import Change, Look
from histossl.wsi.tile_reader import ReadJob, TileBatch
from histossl.wsi.tiles import TileSpec

# Bytes: tiles of a slide that fit are read once for all its views. Fixed, so that memory does not grow with the slide.
CACHE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class EncodeJob:
    """One slide to encode: its file, its tiles, the paths of its features and views.

    Attributes:
        drop: kinds of artefacts to leave out.
        change: of the colours of its tiles; None leaves them.
    """

    slide_id: str
    path: Path
    mpp: float
    tile: TileSpec
    tiles_path: Path
    features_path: Path
    views_path: Path
    drop: tuple[str, ...] = ()
    change: Change | None = None


def encode_fingerprint(tiles: str, encoder: TileEncoder, settings: EncodeSettings, target: Look | None = None) -> str:
    """The fingerprint of a slide's features and views.

    Args:
        tiles: fingerprint of the slide's tiles.
        encoder: of tiles.
        settings: of the encoding.
        target: the colours that tiles get; None for their own.

    Returns:
        `tiles`, a dash, and 16 hex digits for the encoder, all settings and the target.
    """
    more = ["plain"] if settings.views else []  # views of earlier versions lack the un-augmented tiles
    more += [target.numbers()] if target else []
    return f"{tiles}-{fingerprint(encoder.identity, settings, *more)}"


class SlideEncoding:
    """The encoding of one slide: takes batches of tiles in order, and writes features and views whole or not at all.

    Tiles that show a dropped artefact are left out as they come. Views are drawn of those that stay, so they are read
    in a second turn, unless the slide's tiles fit in memory.

    Args:
        job: the slide.
        position: number of the slide; its batches carry it.
        encoder: of tiles.
        settings: of the encoding.
        lost: indices of tiles that cannot be decoded; they are left out.
        why: the reason for the first of them.

    Raises:
        SlideError: the slide's file has changed since it was inspected.
    """

    def __init__(
        self,
        job: EncodeJob,
        position: int,
        encoder: TileEncoder,
        settings: EncodeSettings,
        lost: frozenset[int] = frozenset(),
        why: str = "",
    ) -> None:
        self.job, self.position, self.encoder, self.settings = job, position, encoder, settings
        self.lost, self.why = lost, why
        self.tiles = tile_files.read_tiles_of(job.tiles_path)
        self.all, self.state = len(self.tiles.xy), tile_files.slide_state_of(job.tiles_path)
        self._check_unchanged()
        self.kept = np.array([k for k in range(self.all) if k not in lost], np.int64)
        self.tiles = replace(self.tiles, xy=self.tiles.xy[self.kept])
        target = job.change.target if job.change else None
        self.made = encode_fingerprint(self.tiles.fingerprint, encoder, settings, target)
        count, px = len(self.tiles.xy), job.tile.px
        self.chunks = [slice(a, min(a + settings.batch, count)) for a in range(0, count, settings.batch)]
        self.artefacts = tile_files.read_artefacts(job.tiles_path)
        self.scores = self.artefacts.scores[self.kept]
        self.stays = np.zeros(count, bool)
        self.plan: list[tuple[Augmentation, NDArray[np.int64]]] | None = None
        self.cached = count * px * px * 3 <= CACHE_BYTES
        self.cache: list[NDArray[np.uint8]] = []
        self.stack = ExitStack()
        self.step = 0
        self.lost_now: set[int] = set()
        self.finished = False

    def _check_unchanged(self) -> None:
        if self.state and slide_state(self.job.path) != self.state:
            raise SlideError(self.job.path, "has changed since it was inspected", "run `histossl inspect` again")

    def reads(self) -> Iterator[ReadJob]:
        """The batches of this turn that workers read, in the order that `add` needs."""
        xy, job, judged = self.tiles.xy, self.job, self.plan is None
        wanted = [np.arange(len(xy))[chunk] for chunk in self.chunks]
        if self.plan is not None:
            wanted = [chosen[part] for _, chosen in self.plan for part in self._parts(len(chosen))]
        for step, chosen in enumerate(wanted, self.step):
            about = job.path, job.mpp, xy[chosen], self.tiles.extent, job.tile.mpp, job.tile.px
            yield ReadJob(self.position, step, *about, judged, job.change)

    def add(self, batch: TileBatch) -> None:
        """Encode the next batch; after the last one the files are written and `finished` is true.

        Once a tile is lost, further batches are only searched for more lost tiles; see `incomplete`.

        Args:
            batch: the next one of `reads`.

        Raises:
            SlideError: too many tiles cannot be decoded, the file was changed meanwhile, or a feature is not finite.
        """
        if len(batch.lost):
            self._record_lost(batch)
        if self.lost_now:
            self.step += 1
        else:
            self._encode_batch(batch)

    @property
    def resting(self) -> bool:
        """Whether the features are done, and the tiles of the views are still to be read."""
        return self.plan is not None and self.step == len(self.chunks) and not self.finished

    @property
    def incomplete(self) -> bool:
        """Whether tiles were lost and all batches are searched: the slide is then encoded again without them."""
        return bool(self.lost_now) and self.step >= len(self.chunks)

    def _record_lost(self, batch: TileBatch) -> None:
        plain = self.step < len(self.chunks)
        wanted = np.arange(len(self.kept))[self.chunks[self.step]] if plain else self._drawn(self.step)
        self.lost_now |= {int(k) for k in self.kept[wanted[batch.lost]]}
        self.why = self.why or batch.why.removeprefix(f"{self.job.path.name}: ")
        count = len(self.lost | self.lost_now)
        if count > self.settings.max_lost * self.all:
            what = f"at least {count} of {self.all} tiles cannot be decoded: {self.why}"
            raise SlideError(self.job.path, what, "copy the file again, or raise --encode.max-lost")

    def _drawn(self, step: int) -> NDArray[np.int64]:
        assert self.plan is not None
        parts = self._parts(len(self.plan[0][1]))
        k, part = divmod(step - len(self.chunks), len(parts))
        return self.plan[k][1][parts[part]]

    def _encode_batch(self, batch: TileBatch) -> None:
        if self.step == 0:
            self._begin()
        if self.plan is None:
            self._add_features(batch)
        else:
            self._add_to_view(batch.tiles)
        self.step += 1
        if self.step == len(self.chunks):
            self._draw_views()
        if self.plan is not None and self.step == len(self.chunks) + self._view_steps():
            self._check_unchanged()
            self.stack.close()
            self.finished = True

    def _add_features(self, batch: TileBatch) -> None:
        chunk = self.chunks[self.step]
        self.scores[chunk] = with_pixels(self.scores[chunk], batch.scores)
        kept, _ = judge(self.scores[chunk], self.job.drop)
        before = int(self.stays.sum())
        self.stays[chunk] = kept
        tiles = batch.tiles if kept.all() else batch.tiles[kept]
        if len(tiles):
            self.features[before : before + len(tiles)] = self._encode(tiles, None)
            if self.cached:
                self.cache.append(tiles)

    def _draw_views(self) -> None:
        """Leave out the tiles that do not stay, and draw the views of the others."""
        _, found = judge(self.scores, self.job.drop)
        self.artefacts = together(self.artefacts, found)
        if not self.stays.any():
            what = f"no tile is left of {len(self.stays)} ({self.artefacts})"
            raise SlideError(self.job.path, what, "--tissue.drop names what is left out")
        if not self.stays.all():
            tile_files.leave_out(self.file, self.stays)
            self.kept, self.tiles = self.kept[self.stays], replace(self.tiles, xy=self.tiles.xy[self.stays])
        tile_files.write_artefacts(self.file, self.artefacts)
        self.plan = [draw_plan(self.job.slide_id, k, self.tiles, self.settings) for k in range(self.settings.views)]
        if self.settings.views:
            self._begin_views(self.plan)
        if self.cached:
            self._views_from_cache(self.plan)

    def drop(self, error: BaseException) -> None:
        """Stop encoding the slide, and remove its unfinished files.

        Args:
            error: the reason.
        """
        self.cache = []
        self.stack.__exit__(type(error), error, error.__traceback__)

    def _begin(self) -> None:
        job, count, dim = self.job, len(self.tiles.xy), self.encoder.dim
        if self.settings.views:
            self.folder = self.stack.enter_context(atomic.whole_folder(job.views_path))
        # Entered last, hence closed first: features are in place before the views, so a slide with views is complete.
        self.file = self.stack.enter_context(
            tile_files.new_features_file(job.features_path, job.tiles_path, self.made, self.kept)
        )
        self.features: h5py.Dataset = hdf5.create_features(self.file, count, dim)

    def _begin_views(self, plan: list[tuple[Augmentation, NDArray[np.int64]]]) -> None:
        coords = np.stack([self.tiles.xy[chosen] for _, chosen in plan]).astype(np.int32)
        np.save(self.folder / "coords.npy", coords)
        fingerprints.write_made(self.folder, self.made, stride_level0=self.tiles.stride)
        shape = (len(plan), len(plan[0][1]), self.encoder.dim)
        plain = np.lib.format.open_memmap(self.folder / "plain.npy", "w+", np.float16, shape)
        for k, (_, chosen) in enumerate(plan):
            plain[k] = self.features[chosen]
        plain.flush()
        self.views = np.lib.format.open_memmap(self.folder / "features.npy", "w+", np.float16, shape)
        self.stack.callback(self.views.flush)

    def _parts(self, n: int) -> list[slice]:
        return [slice(a, min(a + self.settings.batch, n)) for a in range(0, n, self.settings.batch)]

    def _view_steps(self) -> int:
        return 0 if self.cached else sum(len(self._parts(len(chosen))) for _, chosen in self.plan or ())

    def _add_to_view(self, tiles: NDArray[np.uint8]) -> None:
        assert self.plan is not None
        parts = self._parts(len(self.plan[0][1]))
        k, part = divmod(self.step - len(self.chunks), len(parts))
        self.views[k, parts[part]] = self._encode(tiles, self.plan[k][0])

    def _views_from_cache(self, plan: list[tuple[Augmentation, NDArray[np.int64]]]) -> None:
        tiles = np.concatenate(self.cache)
        self.cache = []
        for k, (t, chosen) in enumerate(plan):
            for part in self._parts(len(chosen)):
                self.views[k, part] = self._encode(tiles[chosen[part]], t)

    def _encode(self, tiles: NDArray[np.uint8], t: Augmentation | None) -> NDArray[np.float32]:
        features = encode_tiles(self.encoder, torch.from_numpy(tiles), t)
        if not torch.isfinite(features).all():
            bad = int((~torch.isfinite(features).all(dim=1)).nonzero()[0])
            raise SlideError(self.job.path, f"the encoder gave no finite feature for tile {bad} of batch {self.step}")
        return features.numpy()


def draw_plan(
    slide_id: str, k: int, tiles: tile_files.Tiles, settings: EncodeSettings
) -> tuple[Augmentation, NDArray[np.int64]]:
    """Draw the k-th augmentation of a slide and its tiles; a function of seed, slide and k alone.

    Args:
        slide_id: the slide.
        k: number of the view, from 0.
        tiles: of the slide.
        settings: of the encoding.

    Returns:
        The augmentation, and the indices (n,) of the tiles, ascending.
    """
    rng = np.random.default_rng([settings.seed, number_of(slide_id), k])
    t = draw_augmentation(settings.augment, rng)
    return t, choose_tiles(tiles.xy, min(settings.tiles, len(tiles.xy)), settings.window, rng)
