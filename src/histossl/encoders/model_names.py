"""What a name of a tile encoder stands for, and whether it is there; without torch, so that it is looked at at once."""

from __future__ import annotations

import difflib
from importlib.util import find_spec
from pathlib import Path

from histossl.core.errors import FileFormatError

# µm per pixel of the training tiles, from the model cards (20x is 0.5); models trained at several values are left out.
MPP = {
    "MahmoodLab/UNI": 0.5,
    "MahmoodLab/UNI2-h": 0.5,
    "bioptimus/H-optimus-0": 0.5,
    "bioptimus/H-optimus-1": 0.5,
    "owkin/phikon": 0.5,
    "owkin/phikon-v2": 0.5,
    "paige-ai/Virchow": 0.5,
    "prov-gigapath/prov-gigapath": 0.5,
}
_OF_TRANSFORMERS = ("owkin/phikon", "owkin/phikon-v2")
LIBRARIES = {"timm": "timm", "hf": "transformers"}
INSTALL = {
    "timm": "timm needs torchvision, and pip may replace your torch to get it: first install the torchvision of your "
    "torch from the same place as torch (pytorch.org tells the command), then: pip install timm",
    "transformers": "pip install transformers",
}


def known_as(name: str) -> str:
    """The full name of a well-known model, such as `timm:hf-hub:MahmoodLab/UNI` for `uni`; "" where none is near.

    Args:
        name: what somebody wrote.
    """
    short = {full.rpartition("/")[2].casefold(): full for full in MPP}
    near = difflib.get_close_matches(name.rpartition("/")[2].casefold(), short, 1)
    if not near:
        return ""
    full = short[near[0]]
    return f"hf:{full}" if full in _OF_TRANSFORMERS else f"timm:hf-hub:{full}"


def check_name(name: str) -> None:
    """Refuse the name of a tile encoder that cannot be had here, before anything is loaded.

    Args:
        name: as `load_encoder` takes it, or `self`.

    Raises:
        FileFormatError: there is no such file, it is a pickle that was not asked for, or the library is missing.
    """
    kind, _, rest = name.partition(":")
    if name in ("self", "random", "imagenet"):
        return
    if kind in LIBRARIES:
        hub = kind == "hf" and (Path(rest).is_dir() or find_spec("huggingface_hub"))  # it may be a model of ours
        if not (find_spec(LIBRARIES[kind]) or hub):
            raise FileFormatError(f"{name}: needs a library that is missing", INSTALL[LIBRARIES[kind]])
    elif kind == "torchscript":
        if not Path(rest).is_file():
            raise FileFormatError(f"{name}: no such file", "give a file saved by torch.jit.save")
    else:
        weights_file(Path(rest) if kind == "pickle" else Path(name), name, kind == "pickle")


def weights_file(path: Path, name: str, pickled: bool) -> Path:
    """The file of weights, of a path that may be a folder of ours.

    Args:
        path: of a file or a folder.
        name: what somebody wrote.
        pickled: whether a pickle was asked for.

    Returns:
        The file.

    Raises:
        FileFormatError: it is absent, or a pickle that was not asked for.
    """
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        known = known_as(name)
        hint = f"did you mean {known}? " if known else ""
        hint += "use random, imagenet, the path of weights, or a model of a library: timm:NAME, hf:NAME"
        raise FileFormatError(f"no tile encoder at {path}", hint)
    if not (pickled or file.suffix == ".safetensors"):
        hint = f"if you trust where it comes from, name it pickle:{file}: its tensors are read, nothing is executed"
        raise FileFormatError(f"{file}: is a pickle, as all but .safetensors are, and pickles can run programs", hint)
    return file
