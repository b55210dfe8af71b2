"""Settings are frozen dataclasses; here they become dictionaries, files and fingerprints, and come back."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from histossl.core.errors import SettingsError

T = TypeVar("T")


def to_dict(settings: Any) -> dict[str, Any]:
    """A settings dataclass as plain JSON values: every field, nested dataclasses as dictionaries, paths as text."""
    return json.loads(json.dumps(dataclasses.asdict(settings), default=str, allow_nan=False))


def from_dict(kind: type[T], values: dict[str, Any]) -> T:
    """The inverse of `to_dict`; a class may give the former names of its fields as `FORMER_FIELDS`, old -> new.

    Raises:
        SettingsError: a key that `kind` does not have, or a missing one without default.
    """
    hints = typing.get_type_hints(kind)
    renamed: dict[str, str] = getattr(kind, "FORMER_FIELDS", {})
    values = {renamed.get(name, name): value for name, value in values.items()}
    names = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - names)
    if unknown:
        raise SettingsError(
            f"{kind.__name__} has no setting {', '.join(unknown)}", f"it has {', '.join(sorted(names))}"
        )
    try:
        return kind(**{name: _restore(hints[name], value) for name, value in values.items()})
    except TypeError as error:
        raise SettingsError(f"{kind.__name__}: {error}") from error


def _restore(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_dict(typing.cast(type, hint), value)
    if isinstance(value, list):
        return tuple(value)
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is not None and Path in options:
        return Path(value)
    return value


PRECISIONS = ("auto", "float32", "bfloat16")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a setting that is none of its choices, when the settings are made and not hours later.

    Raises:
        SettingsError: `value` is not among `choices`; names the nearest.
    """
    if value not in choices:
        near = difflib.get_close_matches(value, choices, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise SettingsError(f"{name} is {value!r}", f"{hint}choose {', '.join(choices[:-1])} or {choices[-1]}")


def fingerprint(*parts: Any) -> str:
    """A key of everything that made a thing: 16 hex digits of SHA-256 over every field of every part.

    Parts are settings dataclasses or JSON values; a dataclass enters with its name and all of its fields, so that no
    field can be forgotten.
    """
    text = json.dumps([_plain(part) for part in parts], sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def number_of(name: str) -> int:
    """A 64-bit number that depends on a name alone, on every machine: to seed what is drawn for a slide."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "little")


def _plain(part: Any) -> Any:
    if not dataclasses.is_dataclass(part):
        return part
    # A class that was renamed keeps its former name here, so that what it made before still opens.
    return [getattr(part, "FORMER_NAME", type(part).__name__), to_dict(part)]


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The settings in which two resolved dictionaries differ, one `name: old -> new` each, sorted by name."""
    found = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a} -> {b}")
    return found
