"""Presets: settings that `--preset` sets together; flags and config files override them."""

from __future__ import annotations

from typing import Any

from histossl.encoders.settings import EncodeSettings
from histossl.gigassl.embed_settings import EmbedSettings
from histossl.gigassl.encoder_settings import EncoderSettings
from histossl.gigassl.pretrain_settings import PretrainSettings, ViewSettings
from histossl.wsi.tiles import TileSpec

# Giga-SSL as published (Lazard et al., CVPR workshops 2023, and its public code), but for what docs/training.md lists.
PAPER = PretrainSettings(
    epochs=3000,
    batch=256,
    rate=0.03,
    rate_batch=256,
    warmup=10,
    weight_decay=0.0,
    temperature=0.05,
    start="tile-encoder",
    view=ViewSettings(
        tiles=5, windows=0, scale_min=0.5, scale_max=2.0, any_angle=True, share=1.0, dropout=0.0, noise=0.0
    ),
    encoder=EncoderSettings(
        dim=512, inlet="plain", tile_mean=False, prototypes=0, normalise=False, arch="sparse", hard_border=True
    ),
)

# Preset -> settings by the name of the stage's flags.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "tile": TileSpec(px=224, mpp=1.0),
        "encode": EncodeSettings(views=50, tiles=256, window=1),
        "pretrain": PAPER,
        "embed": EmbedSettings(views=50),
    },
}
