"""Tile encoders of other libraries: `timm:NAME`, `hf:NAME`, `torchscript:FILE`; names may be paths.

Each has its own normalisation and input size. timm and transformers are optional and imported only when used. Code that
comes with a model is never executed, except TorchScript, which PyTorch interprets.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from histossl.core.errors import FileFormatError
from histossl.encoders.model_names import INSTALL, LIBRARIES, MPP
from histossl.encoders.resnet import IMAGENET_MEAN, IMAGENET_STD

Triple = tuple[float, float, float]

# The errors of the libraries for models that are unknown, unreachable, gated or damaged; the hub's are OSErrors.
_LOAD_ERRORS = (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, NotImplementedError)


@dataclass(frozen=True)
class ExternalModel:
    """A network of another library, and the input that it needs.

    Attributes:
        network: (B, 3, side, side) normalised -> (B, D).
        mean: of the channels, for values in [0, 1].
        std: standard deviation of the channels, likewise.
        side: pixels of its input's side; None takes tiles of any size.
        mpp: µm per pixel of the tiles that it was trained on; None where that is not documented.
        dtypes: "any" precision, or "float32" where the model may hold constants of that type.
    """

    network: nn.Module
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    side: int | None = None
    mpp: float | None = None
    dtypes: str = "any"


def load_external(kind: str, name: str) -> ExternalModel:
    """Load a model of another library.

    Args:
        kind: one of `KINDS`.
        name: timm: a model of timm, `hf-hub:OWNER/MODEL`, or a folder with config.json and weights. hf: OWNER/MODEL,
            or a folder that `save_pretrained` wrote. Either config.json may have an entry `mpp`. torchscript: a file; a
            JSON file of the same name beside it may give `mean`, `std`, `side` and `mpp`.

    Returns:
        The network, and the input that it needs.

    Raises:
        FileFormatError: the library is missing, or the model is unknown, gated, unreachable or damaged.
    """
    try:
        return KINDS[kind](name)
    except ImportError as error:
        extra = LIBRARIES[kind]
        if find_spec(extra) is None:
            what, hint = "needs a library that is missing", INSTALL[extra]
        else:  # both import torchvision if it is installed, which fails if it was built for another torch
            what = f"{extra} cannot be imported"
            hint = (
                "torchvision of another torch? install the version that matches your torch, or, for hf:, uninstall it"
            )
        raise FileFormatError(f"{kind}:{name}: {what} ({_first_line(error)})", hint) from error
    except _LOAD_ERRORS as error:
        raise FileFormatError(f"{kind}:{name}: cannot be loaded ({_first_line(error)})", _HINTS[kind]) from error


_UNREACHABLE = (
    "if it is gated, request access on its page and run `hf auth login`; without network, download it elsewhere with "
    "`hf download` and give the folder instead of the name"
)
_HINTS = {
    "timm": f"{_UNREACHABLE}; timm needs the torchvision that matches your torch",
    "hf": _UNREACHABLE,
    "torchscript": "give a file saved by torch.jit.save",
}


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def _mpp_of(name: str, stated: Any) -> float | None:
    if stated is None:
        return MPP.get(name.removeprefix("hf-hub:").removeprefix("hf_hub:"))
    if isinstance(stated, bool) or not isinstance(stated, int | float) or not stated > 0:
        raise ValueError(f"its settings say mpp {stated!r}, which is not a number of µm per pixel")
    return float(stated)


def _timm(name: str) -> ExternalModel:
    import timm

    model = timm.create_model(f"local-dir:{name}" if Path(name).is_dir() else name, pretrained=True, num_classes=0)
    expected = timm.data.resolve_model_data_config(model)
    config = Path(name, "config.json")
    stated = json.loads(config.read_text(encoding="utf-8")).get("mpp") if config.is_file() else None
    side = int(expected["input_size"][-1])
    return ExternalModel(model, _triple(expected["mean"]), _triple(expected["std"]), side, _mpp_of(name, stated))


class HiddenState(nn.Module):
    """A model of transformers with its last hidden state as one vector: the class token, or the mean of all positions.

    Args:
        model: of transformers, which takes `pixel_values`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # The model's own pooler is not used: many checkpoints have no weights for it.
        self.has_token = any(n.endswith(("cls_token", "class_embedding")) for n, _ in model.named_parameters())

    def forward(self, x: Tensor) -> Tensor:
        """Encode tiles.

        Args:
            x: (B, 3, side, side) floating, normalised.

        Returns:
            (B, D).
        """
        state = self.model(pixel_values=x).last_hidden_state
        if state.ndim == 4:
            return state.mean(dim=(2, 3))
        return state[:, 0] if self.has_token else state.mean(dim=1)


def _transformers(name: str) -> ExternalModel:
    from transformers import AutoModel
    from transformers.utils import cached_file

    model = AutoModel.from_pretrained(name, trust_remote_code=False)
    file = cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    expected = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
    side = _side_of(expected) or getattr(model.config, "image_size", None)
    mean, std = expected.get("image_mean", IMAGENET_MEAN), expected.get("image_std", IMAGENET_STD)
    mpp = _mpp_of(name, getattr(model.config, "mpp", None))
    return ExternalModel(HiddenState(model), _triple(mean), _triple(std), side if isinstance(side, int) else None, mpp)


def _side_of(expected: dict[str, Any]) -> int | None:
    for key in ("crop_size", "size"):
        size = expected.get(key)
        if isinstance(size, dict):
            size = size.get("height", size.get("shortest_edge"))
        if isinstance(size, int) and (key == "size" or expected.get("do_center_crop", True)):
            return size
    return None


def _torchscript(name: str) -> ExternalModel:
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError("no such file")
    about = path.with_suffix(".json")
    expected = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
    mean, std = expected.get("mean", IMAGENET_MEAN), expected.get("std", IMAGENET_STD)
    model = torch.jit.load(path, map_location="cpu")
    mpp = _mpp_of(name, expected.get("mpp"))
    return ExternalModel(model, _triple(mean), _triple(std), expected.get("side"), mpp, dtypes="float32")


KINDS: dict[str, Callable[[str], ExternalModel]] = {"timm": _timm, "hf": _transformers, "torchscript": _torchscript}


def _triple(values: Any) -> Triple:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def probed_dim(network: nn.Module, name: str, side: int, device: torch.device, dtype: torch.dtype) -> int:
    """Find the length D of a network's features by a trial with two tiles.

    Args:
        network: in evaluation mode.
        name: for messages.
        side: of the tiles in pixels.
        device: of the network.
        dtype: of the network.

    Returns:
        D.

    Raises:
        FileFormatError: the network does not turn (2, 3, side, side) into (2, D).
    """
    try:
        with torch.inference_mode():
            out = network(torch.zeros(2, 3, side, side, device=device, dtype=dtype))
    except _LOAD_ERRORS as error:
        what = f"{name}: cannot take tiles of {side} x {side} pixels ({_first_line(error)})"
        raise FileFormatError(what, "it must turn (B, 3, H, W) into (B, D)") from error
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != 2:
        gave = f"a tensor {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise FileFormatError(f"{name}: gave {gave} for two tiles", "it must turn (B, 3, H, W) into (B, D)")
    return int(out.shape[1])


def hash_of(network: nn.Module) -> str:
    """Hash the names, types, shapes and bytes of all weights and buffers.

    Args:
        network: on any device.

    Returns:
        64 hex digits of SHA-256.
    """
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
