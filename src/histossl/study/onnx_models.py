"""Tile encoders and nuclei models as ONNX graphs, for programs without PyTorch; each is compared with its network."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import histossl
from histossl.core.errors import FileFormatError, SettingsError
from histossl.encoders.tile_encoder import TileEncoder, load_encoder
from histossl.nuclei.network import STRIDE
from histossl.nuclei.patch_contrast import PatchContrast
from histossl.nuclei.segmenter import load_method
from histossl.nuclei.self_training import SelfTraining

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

TOLERANCE = 1e-4  # of the largest output, or of 1 where that is less
WHAT = ("tile-encoder", "nuclei")
_SIDE = 224  # of tiles of networks that no settings say it of
_FIELD = 64  # pixels of the example of a nuclei model


class _Tiles(nn.Module):
    """Tiles in [0, 1] to features: resampling and normalisation, which `TileEncoder` does, and its network."""

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: TileEncoder) -> None:
        super().__init__()
        self.network, self.side = encoder.network, encoder.side
        self.register_buffer("mean", torch.tensor(encoder.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(encoder.std)[:, None, None])

    def forward(self, tiles: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, dim)."""
        if self.side is not None and tuple(tiles.shape[2:]) != (self.side, self.side):
            tiles = F.interpolate(tiles, (self.side, self.side), mode="bilinear", antialias=True).clamp(0, 1)
        return self.network((tiles - self.mean) * (1 / self.std))


class _Confidence(nn.Module):
    """Optical density to confidence and depth, the mean over the settings' directions."""

    def __init__(self, method: SelfTraining) -> None:
        super().__init__()
        self.network, self.turns = method.network.folded(), range(0, 4, 4 // method.settings.turns)

    def forward(self, density: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 2, H, W) in [0, 1]; H and W multiples of 4."""
        each = [torch.rot90(self.network(torch.rot90(density, k, (2, 3))).sigmoid(), -k, (2, 3)) for k in self.turns]
        return torch.stack(each).mean(0)


class _Maps(nn.Module):
    """RGB to the confidences of patch contrast, every channel of them."""

    def __init__(self, method: PatchContrast) -> None:
        super().__init__()
        self.network, self.lowest = method.network, method.settings.lowest

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, C, H, W) in [0, 1]."""
        return self.network(self.lowest + (1 - self.lowest) * image)


def write_onnx(what: str, folder: Path, path: Path) -> None:
    """Write a model as an ONNX graph, and compare what both give.

    The graph of a tile encoder takes `tiles` (batch, 3, H, W) float32 RGB in [0, 1] of the size that its settings say,
    and gives `features` (batch, dim). That of a nuclei model takes `density` (batch, 3, height, width), optical density
    in units of the slide's scale, or with patch contrast `image`, RGB in [0, 1]; height and width are multiples of 4;
    and gives `confidence` (batch, 2, height, width): nucleus and depth, or the channels of patch contrast. Its
    `metadata_props` say so, too.

    Args:
        what: tile-encoder or nuclei.
        folder: of the model.
        path: the new file, `.onnx`.

    Raises:
        SettingsError: a library is missing, or `what` is something else.
        FileFormatError: the model cannot be read, or its graph does not give the same to 1e-4.
    """
    if what not in WHAT:
        raise SettingsError(f"--onnx with --what {what}", f"there is ONNX of {' and of '.join(WHAT)}")
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise SettingsError(f"--onnx needs {error.name}", "pip install 'histossl[onnx]'") from error
    network, names, example, about = _tiles(folder) if what == "tile-encoder" else _nuclei(folder)
    program = _graph(network.eval(), names, example, what == "nuclei")
    props = program.model.metadata_props
    props.update({"histossl": histossl.__version__, "what": what, **about})
    program.save(str(path))
    _compare(network, names, example, path)


def _tiles(folder: Path) -> tuple[nn.Module, tuple[str, str], Tensor, dict[str, str]]:
    """The network, the names of in- and output, an example, and what is to be said."""
    encoder = load_encoder(folder, precision="float32")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tile = config.get("tile") if isinstance(config.get("tile"), dict) else {}
    side = int((tile or {}).get("px") or encoder.side or _SIDE)
    about = {"input": f"tiles: RGB in [0, 1], {side} x {side} px", "output": f"features: {encoder.dim} numbers a tile"}
    about |= {"mpp": str(encoder.mpp)} if encoder.mpp else {}
    return _Tiles(encoder), ("tiles", "features"), _example(3, side), about


def _nuclei(folder: Path) -> tuple[nn.Module, tuple[str, str], Tensor, dict[str, str]]:
    method = load_method(str(folder.resolve()), "cpu")
    about = {"mpp": str(method.mpp)}
    if isinstance(method, SelfTraining):
        about |= {"input": "density: optical density in units of the slide's scale", "output": "nucleus and depth"}
        return _Confidence(method), ("density", "confidence"), _example(2, _FIELD), about
    assert isinstance(method, PatchContrast)
    channel = method.choice.channel
    about |= {"input": "image: RGB in [0, 1]", "output": f"channels; nuclei are in number {channel}, counted from 0"}
    return _Maps(method), ("image", "confidence"), _example(2, _FIELD), about


def _example(count: int, side: int) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def _graph(network: nn.Module, names: tuple[str, str], example: Tensor, any_size: bool) -> ONNXProgram:
    # The exporter tells of every try and of libraries that it could use; what matters is compared afterwards.
    noisy = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [log.level for log in noisy]
    sizes: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    if any_size:
        sizes |= {2: STRIDE * torch.export.Dim("rows", min=8), 3: STRIDE * torch.export.Dim("columns", min=8)}
    try:
        for log in noisy:
            log.setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            made = torch.export.export(network, (example,), dynamic_shapes=(sizes,), strict=False)
            program = torch.onnx.export(
                made, dynamo=True, input_names=names[:1], output_names=names[1:], verbose=False, optimize=True
            )
    finally:
        for log, level in zip(noisy, levels, strict=True):
            log.setLevel(level)
    assert program is not None
    return program


def _compare(network: nn.Module, names: tuple[str, str], example: Tensor, path: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for x in (example, example[:1]):
        with torch.inference_mode():
            wanted = network(x)
        found = torch.from_numpy(session.run(None, {names[0]: x.numpy()})[0])
        largest = max(1.0, float(wanted.abs().max()))
        if found.shape != wanted.shape or not float((found - wanted).abs().max()) <= TOLERANCE * largest:
            what = f"{path.name}: the graph gives {float((found - wanted).abs().max()):.1e} else than the network"
            raise FileFormatError(what, "use the weights instead, and report it with the versions of torch and onnx")
