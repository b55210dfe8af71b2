"""Loads the slide encoders that the authors of Giga-SSL publish.

Their checkpoints are pickles. Nothing in them is executed: only tensors and plain values are read; objects of other
classes are replaced by empty ones.
"""

from __future__ import annotations

import collections
import pickle
import re
import types
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._utils import _rebuild_parameter, _rebuild_tensor_v2

from histossl.core.errors import FileFormatError
from histossl.gigassl.encoder import SlideEncoder
from histossl.gigassl.encoder_settings import EncoderSettings

# Name in checkpoints -> name in `Stage`, both after the number of the block.
PARTS = {
    "conv1": "conv1",
    "norm1": "bn1",
    "bn1": "bn1",
    "conv2": "conv2",
    "norm2": "bn2",
    "bn2": "bn2",
    "convd": "shortcut",
    "normd": "shortcut_bn",
    "downsample.0": "shortcut",
    "downsample.1": "shortcut_bn",
}
NAME = re.compile(rf"(?:^|\.)([01])\.({'|'.join(map(re.escape, PARTS))})\.(weight|bias|running_mean|running_var)$")


def load_published(path: Path) -> SlideEncoder:
    """Load the slide encoder of a Giga-SSL checkpoint.

    For tiles at whole, non-negative positions the results equal those of the published layers: tiles on one site are
    averaged, strided layers have no padding, the average pool divides by nine, the vector is the mean over the sites of
    the last map. One thing differs: the published code also ends the map at its last row and column, which depend on
    the other slides of the batch; here the map has no such end.

    Args:
        path: of a file that `torch.save` wrote: a state, or a dictionary with `state_dict`.

    Returns:
        The encoder, in evaluation mode.

    Raises:
        FileFormatError: there is no such file, or its weights are of another network; the message names the first
            weight that is missing or ambiguous.
    """
    state = read_state(path)
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        match = NAME.search(name)
        if match and isinstance(value, Tensor):
            block, part, kind = match.groups()
            key = f"blocks.{block}.{PARTS[part]}.{kind}"
            if key in found:
                raise FileFormatError(f"{path}: two tensors could be {key}, one of them {name}", "save one model alone")
            found[key] = value.detach().clone().float()
    kernel = found.get("blocks.0.conv1.weight")
    if kernel is None or kernel.ndim != 4 or kernel.shape[:2] != (9, 1):
        some = ", ".join(list(state)[:3]) or "nothing"
        hint = "give a checkpoint of Giga-SSL's sparse slide encoder, with 0.conv1.weight of shape (9, 1, in, out)"
        raise FileFormatError(f"{path}: has no sparse slide encoder, but {some}", hint)
    in_dim, dim = kernel.shape[2:]
    made = EncoderSettings(in_dim, dim, "plain", False, 0, normalise=False, hard_border=True, linear=False)
    encoder = SlideEncoder(made)
    for name, wanted in encoder.stage.state_dict().items():
        if name.endswith("num_batches_tracked"):
            found[name] = torch.zeros_like(wanted)
        elif name not in found or found[name].numel() != wanted.numel():
            shape = tuple(found[name].shape) if name in found else "missing"
            raise FileFormatError(
                f"{path}: {name} is {shape}, not {tuple(wanted.shape)}", "the checkpoint is of another network"
            )
        else:
            found[name] = found[name].reshape(wanted.shape)
    encoder.stage.load_state_dict(found)
    return encoder.eval()


def read_state(path: Path) -> dict[str, Any]:
    """Read the tensors of a checkpoint; nothing in the file is executed.

    Args:
        path: of a file that `torch.save` wrote.

    Returns:
        Name -> value, mostly tensors.

    Raises:
        FileFormatError: the file does not exist, is not written by `torch.save`, or has no dictionary.
    """
    if zipfile.is_zipfile(path) and any(name.endswith("constants.pkl") for name in zipfile.ZipFile(path).namelist()):
        raise FileFormatError(f"{path}: a TorchScript program, not a checkpoint", "give a file that torch.save wrote")
    # torch.load reads pickles with the module that it is given; the unpickler of this one creates no foreign classes.
    reader: Any = types.ModuleType("inert")
    reader.Unpickler, reader.load = _Inert, lambda file, **more: _Inert(file, **more).load()
    try:
        found = torch.load(path, map_location="cpu", pickle_module=reader, weights_only=False)
    except OSError as error:
        raise FileFormatError(f"{path}: {error.strerror or error}", "give the file of a checkpoint") from error
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise FileFormatError(f"{path}: not a checkpoint that torch.save wrote ({error})") from error
    except (pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise FileFormatError(f"{path}: not a checkpoint that torch.save wrote ({error})") from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict):
        raise FileFormatError(f"{path}: has a {type(found).__name__}, not the tensors of a network")
    return {str(name): value for name, value in found.items()}


class _Nothing:
    """Replaces objects of classes that are not needed: accepts all that a pickle does with them, and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, *_: Any) -> None: ...

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...


class _Inert(pickle.Unpickler):
    """Creates tensors, dictionaries and plain values; objects of all other classes become `_Nothing`."""

    KNOWN = {  # noqa: RUF012 - never written to
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        ("torch", "Size"): torch.Size,
    }

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name.endswith("Storage"):  # types of storages, which files written before 2020 name
            return getattr(torch, name, _Nothing)
        return self.KNOWN.get((module, name), _Nothing)
