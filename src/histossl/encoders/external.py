"""Anybody's tile encoders: `timm:NAME`, `hf:NAME`, `torchscript:FILE`, each with its own transform; names may be paths.

Libraries are imported where they are used: timm and transformers are extras. Nothing that a model brings is executed,
but TorchScript, which PyTorch interprets.
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
from histossl.encoders.resnet import IMAGENET_MEAN, IMAGENET_STD

Triple = tuple[float, float, float]

# What the libraries raise for models that are unknown, out of reach, gated or damaged; the hub's errors are OSErrors.
_REFUSALS = (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, NotImplementedError)


@dataclass(frozen=True)
class ExternalModel:
    """A network of another library, and what it wants to see.

    Attributes:
        network: (B, 3, side, side) normalised -> (B, D).
        mean, std: of the channels, for values in [0, 1].
        side: pixels of its input's side; None takes tiles of any size.
        mpp: µm per pixel of the tiles that it was trained on; None where nobody says.
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
            or a folder that `save_pretrained` wrote. Either config.json may say `mpp`. torchscript: a file; `mean`,
            `std`, `side`, `mpp` may stand beside it, in a JSON file of the same name.

    Raises:
        FileFormatError: the library is missing, or the model is unknown, gated, out of reach or damaged.
    """
    try:
        return KINDS[kind](name)
    except ImportError as error:
        extra = "transformers" if kind == "hf" else kind
        if find_spec(extra) is None:
            what, hint = "needs a library that is missing", f"pip install 'histossl[{extra}]'"
        else:  # both import torchvision where they find one
            what = f"{extra} cannot be imported"
            hint = "is there a torchvision of another torch? install the one that belongs to yours, or, for hf:, none"
        raise FileFormatError(f"{kind}:{name}: {what} ({_first_line(error)})", hint) from error
    except _REFUSALS as error:
        raise FileFormatError(f"{kind}:{name}: cannot be loaded ({_first_line(error)})", _HINTS[kind]) from error


_OUT_OF_REACH = (
    "if it is gated, ask for access on its page and run `hf auth login`; without network, fetch it elsewhere with "
    "`hf download` and give the folder instead of the name"
)
_HINTS = {
    "timm": f"{_OUT_OF_REACH}; timm needs the torchvision that belongs to your torch",
    "hf": _OUT_OF_REACH,
    "torchscript": "give a file saved by torch.jit.save",
}


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


# µm per pixel of the tiles that these were trained on, as their cards say (20x is 0.5); models of several have none.
_MPP = {
    "MahmoodLab/UNI": 0.5,
    "MahmoodLab/UNI2-h": 0.5,
    "bioptimus/H-optimus-0": 0.5,
    "bioptimus/H-optimus-1": 0.5,
    "owkin/phikon": 0.5,
    "owkin/phikon-v2": 0.5,
    "paige-ai/Virchow": 0.5,
    "prov-gigapath/prov-gigapath": 0.5,
}


def _mpp_of(name: str, stated: Any) -> float | None:
    if stated is None:
        return _MPP.get(name.removeprefix("hf-hub:").removeprefix("hf_hub:"))
    if isinstance(stated, bool) or not isinstance(stated, int | float) or not stated > 0:
        raise ValueError(f"its settings say mpp {stated!r}, which is no number of µm per pixel")
    return float(stated)


def _timm(name: str) -> ExternalModel:
    import timm

    model = timm.create_model(f"local-dir:{name}" if Path(name).is_dir() else name, pretrained=True, num_classes=0)
    wants = timm.data.resolve_model_data_config(model)
    config = Path(name, "config.json")
    stated = json.loads(config.read_text(encoding="utf-8")).get("mpp") if config.is_file() else None
    side = int(wants["input_size"][-1])
    return ExternalModel(model, _triple(wants["mean"]), _triple(wants["std"]), side, _mpp_of(name, stated))


class HiddenState(nn.Module):
    """The last hidden state of a model of transformers as one vector: its class token, or the mean of all places."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # The pooler is left out: many checkpoints come without its weights.
        self.has_token = any(n.endswith(("cls_token", "class_embedding")) for n, _ in model.named_parameters())

    def forward(self, x: Tensor) -> Tensor:
        state = self.model(pixel_values=x).last_hidden_state
        if state.ndim == 4:
            return state.mean(dim=(2, 3))
        return state[:, 0] if self.has_token else state.mean(dim=1)


def _transformers(name: str) -> ExternalModel:
    from transformers import AutoModel
    from transformers.utils import cached_file

    model = AutoModel.from_pretrained(name, trust_remote_code=False)
    file = cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    wants = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
    side = _side_of(wants) or getattr(model.config, "image_size", None)
    mean, std = wants.get("image_mean", IMAGENET_MEAN), wants.get("image_std", IMAGENET_STD)
    mpp = _mpp_of(name, getattr(model.config, "mpp", None))
    return ExternalModel(HiddenState(model), _triple(mean), _triple(std), side if isinstance(side, int) else None, mpp)


def _side_of(wants: dict[str, Any]) -> int | None:
    for key in ("crop_size", "size"):
        size = wants.get(key)
        if isinstance(size, dict):
            size = size.get("height", size.get("shortest_edge"))
        if isinstance(size, int) and (key == "size" or wants.get("do_center_crop", True)):
            return size
    return None


def _torchscript(name: str) -> ExternalModel:
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError("no such file")
    about = path.with_suffix(".json")
    wants = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
    mean, std = wants.get("mean", IMAGENET_MEAN), wants.get("std", IMAGENET_STD)
    model = torch.jit.load(path, map_location="cpu")
    mpp = _mpp_of(name, wants.get("mpp"))
    return ExternalModel(model, _triple(mean), _triple(std), wants.get("side"), mpp, dtypes="float32")


KINDS: dict[str, Callable[[str], ExternalModel]] = {"timm": _timm, "hf": _transformers, "torchscript": _torchscript}


def _triple(values: Any) -> Triple:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def probed_dim(network: nn.Module, name: str, side: int, device: torch.device, dtype: torch.dtype) -> int:
    """D of a network, which it is asked for.

    Raises:
        FileFormatError: it does not turn (2, 3, side, side) into (2, D).
    """
    try:
        with torch.inference_mode():
            out = network(torch.zeros(2, 3, side, side, device=device, dtype=dtype))
    except _REFUSALS as error:
        what = f"{name}: cannot take tiles of {side} x {side} pixels ({_first_line(error)})"
        raise FileFormatError(what, "it must turn (B, 3, H, W) into (B, D)") from error
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != 2:
        gave = f"a tensor {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise FileFormatError(f"{name}: gave {gave} for two tiles", "it must turn (B, 3, H, W) into (B, D)")
    return int(out.shape[1])


def hash_of(network: nn.Module) -> str:
    """SHA-256 of the names and bytes of all weights and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
