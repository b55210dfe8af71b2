"""Tile encoders by name: `random`, `imagenet`, ResNet-18 weights, a folder that we wrote, or anybody's."""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from histossl.core.atomic import whole_folder
from histossl.core.errors import FileFormatError, SettingsError
from histossl.core.hub import ours
from histossl.encoders.external import KINDS, hash_of, load_external, probed_dim
from histossl.encoders.joint import Joint
from histossl.encoders.model_names import weights_file
from histossl.encoders.patch_kmeans import PatchKMeans
from histossl.encoders.resnet import IMAGENET_MEAN, IMAGENET_STD, ResNet18, fold_batch_norms, state_of
from histossl.training.device import keep_buffers, pick_device, pick_dtype

# The name carries the first eight digits of the file's SHA-256, which torch.hub checks.
IMAGENET_URL = "https://download.pytorch.org/models/resnet18-f37072fd.pth"


@dataclass(frozen=True)
class TileEncoder:
    """A network and what belongs to it: tiles in, features out.

    Attributes:
        identity: what the features depend on besides the tile: the name, and a hash of the weights.
        network: (B, 3, H, W) normalised -> (B, dim), in evaluation mode.
        dim: length of a feature.
        mean: of the channels, for values in [0, 1].
        std: their standard deviation.
        dtype: what it computes in.
        device: where it computes.
        side: pixels of the side that tiles are resampled to; None takes them as they are.
        mpp: µm per pixel of the tiles that it was trained on; None where nobody says.
    """

    identity: dict[str, str]
    network: nn.Module
    dim: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    dtype: torch.dtype
    device: torch.device
    side: int | None = None
    mpp: float | None = None

    def __repr__(self) -> str:
        trained = "" if self.mpp is None else f", trained at mpp {self.mpp:g}"
        side = "" if self.side is None else f" of {self.side} px"
        number = str(self.dtype).removeprefix("torch.")
        name = self.identity["name"]
        return f"TileEncoder({name!r}, tiles{side} -> {self.dim} numbers, {number} on {self.device}{trained})"

    def __call__(self, tiles: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, dim) float32 on the CPU."""
        return self.on_device(tiles).cpu()

    @torch.inference_mode()
    def on_device(self, tiles: Tensor) -> Tensor:
        """Encode tiles, without waiting for the result.

        Args:
            tiles: (B, 3, H, W) in [0, 1].

        Returns:
            (B, dim) float32 on `device`.
        """
        if self.side is not None and tiles.shape[2:] != (self.side, self.side):
            resized = F.interpolate(tiles.float(), (self.side, self.side), mode="bilinear", antialias=True)
            tiles = resized.clamp_(0, 1)
        mean = torch.tensor(self.mean, device=self.device, dtype=self.dtype)[:, None, None]
        std = torch.tensor(self.std, device=self.device, dtype=self.dtype)[:, None, None]
        x = (tiles.to(self.device, self.dtype) - mean).mul_(1 / std)
        return self.network(x.contiguous(memory_format=torch.channels_last)).float()


def load_encoder(name: str | Path, seed: int = 0, device: str = "cpu", precision: str = "auto") -> TileEncoder:
    """A tile encoder, ready to run.

    Args:
        name: `random` (seeded, untrained), `imagenet` (torchvision's ResNet-18, fetched once and kept), the
            path of a .safetensors file of ResNet-18 weights (torchvision's, MoCo's or ours), `pickle:FILE` for such
            weights in any other file (.pth, .pt, .tar), or a folder of ours with model.safetensors and config.json. Of
            a ResNet-18, all after `layer3` is cut off: dim = 256; visual words have a dim of six times their count. Or
            anybody's model: `timm:NAME`, `hf:NAME`, `torchscript:FILE`, see `load_external`; `hf:OWNER/NAME` may also
            be a folder of ours that lies on Hugging Face.
        seed: of `random`.
        device: auto, cpu or cuda.
        precision: auto, float32 or bfloat16.

    Returns:
        The encoder: `encoder(tiles)` turns (B, 3, H, W) in [0, 1] into (B, dim) float32.

    Raises:
        FileFormatError: the weights are absent, truncated, pickled without `pickle:` or of more than tensors, or of
            another architecture; or a model of another library cannot be had or does not give (B, D).
        SettingsError: an unknown device or precision, or `self`, which stands for an encoder that is yet to be trained.
    """
    name = str(name)
    if name == "self":
        hint = "give the folder STUDY/tile-encoder, or train one: histossl.pretrain_tiles(slides)"
        raise SettingsError("'self' is an encoder trained on your slides, and is in no file of that name", hint)
    where = pick_device(device)
    dtype = pick_dtype(precision, where)
    keep_buffers()
    name = _found(name)
    kind, _, rest = name.partition(":")
    if kind in KINDS:
        return _external_encoder(kind, rest, where, precision)
    network: ResNet18 | PatchKMeans | Joint
    mpp = None
    if name == "random":
        identity = {"name": "random", "seed": str(seed)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = ResNet18(stages=3)
    else:
        path, _ = _place_of(name)
        network, mpp = _network_of(name), _mpp_of(path)
        file = path / "model.safetensors" if path.is_dir() else path
        identity = {"name": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    if isinstance(network, PatchKMeans | Joint):
        identity["dtype"] = "float32"  # a contrast is a difference of sums: eight bits are too few
        words = network.to(where)
        return TileEncoder(identity, words, words.dim, (0, 0, 0), (1, 1, 1), torch.float32, where, mpp=mpp)
    identity["dtype"] = str(dtype).removeprefix("torch.")
    network = fold_batch_norms(network).to(device=where, dtype=dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return TileEncoder(
        identity, network.requires_grad_(False), network.dim, IMAGENET_MEAN, IMAGENET_STD, dtype, where, mpp=mpp
    )


def fourth_stage(name: str) -> dict[str, Tensor]:
    """The fourth stage of a ResNet-18, which is no part of the tile encoder: `layer4.` weights, none where it has none.

    Args:
        name: of a tile encoder, as `load_encoder` takes it.

    Raises:
        FileFormatError: see `load_encoder`.
    """
    name = _found(name)
    if name == "random" or name.partition(":")[0] in KINDS:
        return {}
    return {n: v.contiguous() for n, v in state_of(read_weights(name)).items() if n.startswith("layer4.")}


def _found(name: str) -> str:
    """The folder of what `hf:` names, where it is a tile encoder of ours; any other name as it is."""
    kind, _, rest = name.partition(":")
    folder = ours(rest) if kind == "hf" else None
    return name if folder is None else str(folder)


def _external_encoder(kind: str, name: str, where: torch.device, precision: str) -> TileEncoder:
    found = load_external(kind, name)
    exact = found.dtypes == "float32" and precision == "auto"
    dtype = torch.float32 if exact else pick_dtype(precision, where)
    identity = {"name": f"{kind}:{Path(name).name}", "sha256": hash_of(found.network)}
    identity |= {"dtype": str(dtype).removeprefix("torch."), "side": str(found.side)}
    identity |= {"mean": str(found.mean), "std": str(found.std)}
    network = found.network.eval().to(device=where, dtype=dtype)  # type: ignore[call-overload]
    dim = probed_dim(network, f"{kind}:{name}", found.side or 224, where, dtype)
    return TileEncoder(identity, network, dim, found.mean, found.std, dtype, where, found.side, found.mpp)


def _mpp_of(path: Path) -> float | None:
    """Of the tiles that an encoder of ours was trained on."""
    try:
        return float(json.loads((path / "config.json").read_text(encoding="utf-8"))["tile"]["mpp"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _network_of(name: str) -> ResNet18 | PatchKMeans | Joint:
    """The network whose weights a name stands for."""
    weights = read_weights(name)
    if "words.centres" in weights:
        return _joint_of(weights, name)
    if "centres" not in weights:
        with torch.random.fork_rng(devices=[]):
            network = ResNet18(stages=3)
        load_resnet(network, state_of(weights), name)
        return network
    words = PatchKMeans(weights["centres"].shape[1] if weights["centres"].ndim == 3 else 2)
    try:
        words.load_state_dict(weights)
    except RuntimeError as error:
        raise FileFormatError(f"{name}: damaged visual words ({error})", "train them anew") from error
    return words.eval()


def _joint_of(weights: dict[str, Tensor], name: str) -> Joint:
    try:
        return Joint.of(weights)
    except (RuntimeError, KeyError, IndexError) as error:
        raise FileFormatError(f"{name}: damaged visual words ({error})", "train them anew") from error


def load_resnet(network: nn.Module, weights: dict[str, Tensor], name: str) -> None:
    """Load ResNet-18 weights into a network.

    Args:
        network: a ResNet-18 or its first stages, changed in place; weights that it lacks are ignored.
        weights: tensors by name.
        name: of the weights, for messages.

    Raises:
        FileFormatError: a weight is missing or has another shape.
    """
    wanted = network.state_dict()
    # Files older than PyTorch 0.4.1 carry no batch counters; they are never read in evaluation.
    missing = [n for n in wanted if n not in weights and not n.endswith("num_batches_tracked")]
    wrong = [n for n in wanted if n in weights and weights[n].shape != wanted[n].shape]
    if missing or wrong:
        first = f"{missing[0]} is missing" if missing else f"{wrong[0]} has shape {tuple(weights[wrong[0]].shape)}"
        raise FileFormatError(f"{name}: not the weights of a ResNet-18 ({first})", "give ResNet-18 weights")
    network.load_state_dict({n: weights[n] for n in wanted if n in weights}, strict=False)


def read_weights(name: str) -> dict[str, Any]:
    """The tensors of a weight file, or of a folder that `save_encoder` wrote.

    Nothing in a pickle is executed by `weights_only`, but that promise has been broken before (CVE-2025-32434).

    Args:
        name: path of a folder or .safetensors file; of any other file, a pickle, as `pickle:FILE`.

    Returns:
        Tensors by name; those of a pickle may be nested, see `state_of`.

    Raises:
        FileFormatError: absent, truncated, a pickle that was not requested, or one of more than tensors.
    """
    path, pickled = _place_of(name)
    file = weights_file(path, name, pickled)
    safe = file.suffix == ".safetensors"
    try:
        found = load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        more = "weights_only" in str(error).lower()
        what = "holds pickled objects" if more else "is truncated or not a weight file"
        raise FileFormatError(f"{file}: {what}", "give a state dict saved by torch.save or safetensors") from error
    if not isinstance(found, dict):
        what = f"{file}: holds a {type(found).__name__}, no weights by name"
        raise FileFormatError(what, "give a state dict saved by torch.save or safetensors")
    return found


def _place_of(name: str) -> tuple[Path, bool]:
    """Where the weights lie that a name stands for, and whether they may be pickled."""
    if name == "imagenet":
        return _imagenet_file(), True
    kind, _, rest = name.partition(":")
    return (Path(rest), True) if kind == "pickle" else (Path(name), False)


def save_encoder(network: nn.Module, folder: Path, settings: dict) -> None:
    """Write model.safetensors and config.json, whole or not at all; `load_encoder(folder)` reads them.

    Args:
        network: whose state is written.
        folder: of the encoder.
        settings: the content of config.json.

    Raises:
        OSError: the files cannot be written.
    """
    with whole_folder(folder) as part:
        weights = save({n: v.contiguous() for n, v in network.state_dict().items()})
        (part / "model.safetensors").write_bytes(weights)  # an OSError where the disk is full, as of any file
        (part / "config.json").write_text(json.dumps(settings, indent=1, sort_keys=True))


def _imagenet_file() -> Path:
    target = Path(torch.hub.get_dir()) / "checkpoints" / IMAGENET_URL.rsplit("/", 1)[-1]
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(IMAGENET_URL, str(target), hash_prefix="f37072fd")
        except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash is a RuntimeError
            hint = f"download {IMAGENET_URL} elsewhere and give its path as the tile encoder"
            raise FileFormatError(f"cannot fetch the ImageNet weights ({error})", hint) from error
    return target
