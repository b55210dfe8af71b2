"""Pictures whose every pixel is known, and slides made of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile

from histossl.wsi.geometry import Region
from histossl.wsi.slide import open_slide

HEIGHT, WIDTH = 300, 420
CENTIMETRE = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}  # 0.5 µm
APERIO = "Aperio Image Library v12\r\n900x700 [0,0 900x700] (128x128) JPEG/RGB Q=70|AppMag = 40|{}Filename = 7"


def picture(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    waves = 128 + 90 * np.sin(x / 9.0), 128 + 90 * np.cos(y / 7.0), 128 + 60 * np.sin((x + 2 * y) / 30)
    return np.stack(waves, 2).astype(np.uint8)


def ramp(height: int, width: int, down: int = 1) -> np.ndarray:
    """Values that a level with this downsample shows of a plane x/4 + y/5, at pixel centres."""
    y, x = (np.mgrid[: height // down, : width // down] + 0.5) * down
    return np.rint(np.stack([x / 4, y / 5, (x + y) / 8], 2)).astype(np.uint8)


def write_tiff(path: Path, image: np.ndarray, **options) -> Path:
    tifffile.imwrite(path, image, **{"photometric": "rgb", **CENTIMETRE, **options})
    return path


def write_pyramid(path: Path, levels: list[np.ndarray]) -> Path:
    with tifffile.TiffWriter(path) as tiff:
        for k, level in enumerate(levels):
            tiff.write(level, tile=(64, 64), photometric="rgb", subfiletype=int(k > 0), **CENTIMETRE)
    return path


def write_ome_pyramid(path: Path, levels: list[np.ndarray]) -> Path:
    sizes = {"PhysicalSizeX": 500, "PhysicalSizeY": 500, "PhysicalSizeXUnit": "nm", "PhysicalSizeYUnit": "nm"}
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(
            levels[0], tile=(64, 64), photometric="rgb", subifds=len(levels) - 1, metadata={"axes": "YXS", **sizes}
        )
        for level in levels[1:]:
            tiff.write(level, tile=(64, 64), photometric="rgb", subfiletype=1)
    return path


def whole(path: Path, **mpp: float) -> np.ndarray:
    with open_slide(path, **mpp) as slide:
        return slide.read(Region.whole(slide.size), slide.mpp)


# --- the six real slides ------------------------------------------------------------------------------------------
