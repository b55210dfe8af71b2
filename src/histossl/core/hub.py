"""Models on Hugging Face: folders that `histossl export` wrote, put there and fetched by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from histossl.core.errors import FileFormatError, SettingsError

PREFIX = "hf:"
KINDS_OF_FILES = ("*.safetensors", "*.json", "*.onnx", "README.md")  # no pickles, no programs


def model_folder(name: str | Path) -> Path:
    """The folder of a model: a path as it is, `hf:OWNER/NAME` or `hf:OWNER/NAME@REVISION` as what was fetched of it.

    What was fetched before is kept, and taken from there without a network.

    Args:
        name: a path, or a name on Hugging Face.

    Returns:
        The folder; whether it holds a model is not looked at.

    Raises:
        SettingsError: huggingface_hub is missing.
        FileFormatError: the name cannot be had.
    """
    text = str(name)
    if not text.startswith(PREFIX) or Path(text).exists():
        return Path(text)
    if (local := Path(text.removeprefix(PREFIX))).is_dir():
        return local
    hub, errors = _hub()
    repo, _, revision = text.removeprefix(PREFIX).partition("@")
    try:
        found = hub.snapshot_download(
            repo, revision=revision or None, endpoint=_endpoint(), allow_patterns=list(KINDS_OF_FILES)
        )
    except errors as error:
        hint = "without network, `hf download` it elsewhere and give the folder; if it is private: `hf auth login`"
        raise FileFormatError(f"{text}: cannot be had from Hugging Face ({_first_line(error)})", hint) from error
    return Path(found)


def ours(name: str) -> Path | None:
    """The folder of a tile encoder that we wrote, of a name that may also be that of a model of transformers.

    Args:
        name: OWNER/NAME on Hugging Face, or a folder; without `hf:`.

    Returns:
        The folder; None where its settings are not ours, or nothing can be had of it.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder if _is_ours(folder / "config.json") else None
    try:
        hub, errors = _hub()
    except SettingsError:
        return None
    repo, _, revision = name.partition("@")
    try:
        settings = hub.hf_hub_download(repo, "config.json", revision=revision or None, endpoint=_endpoint())
    except errors:
        return None
    return model_folder(f"{PREFIX}{name}") if _is_ours(Path(settings)) else None


def _is_ours(settings: Path) -> bool:
    try:
        config = json.loads(settings.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and isinstance(config.get("tile"), dict) and "fingerprint" in config


def push(folder: Path, name: str) -> str:
    """Put a folder on Hugging Face, as a private repository where there is none of that name.

    Args:
        folder: that `histossl export` wrote.
        name: OWNER/NAME, with or without `hf:`.

    Returns:
        The address of the repository.

    Raises:
        SettingsError: huggingface_hub is missing.
        FileFormatError: it cannot be put there.
    """
    hub, errors = _hub()
    repo = name.removeprefix(PREFIX)
    try:
        api = hub.HfApi(endpoint=_endpoint())
        address = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="A model of histossl")
    except errors as error:
        hint = f"{folder} is whole: upload it later with `hf upload {repo} {folder}`; it needs `hf auth login`"
        raise FileFormatError(f"{repo}: cannot be put on Hugging Face ({_first_line(error)})", hint) from error
    return str(address)


def _hub() -> tuple[Any, tuple[type[Exception], ...]]:
    """The library, and the errors of names, networks and rights."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise SettingsError("names on Hugging Face need huggingface_hub", "pip install 'histossl[hub]'") from error
    # Until version 1 its network errors were OSErrors of requests, since then those of httpx.
    network = getattr(errors, "HTTPError", None)
    kinds = (OSError, ValueError, errors.HfHubHTTPError)
    return huggingface_hub, (*kinds, network) if isinstance(network, type) else kinds


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
