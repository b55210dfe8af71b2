"""Settings are frozen dataclasses; this module converts them to dictionaries and back, and fingerprints them."""

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
    """Convert a settings dataclass to plain JSON values.

    Args:
        settings: an instance of a dataclass.

    Returns:
        Every field by name: nested dataclasses as dictionaries, tuples as lists, paths as text.

    Raises:
        ValueError: a number is not finite.
    """
    return json.loads(json.dumps(dataclasses.asdict(settings), default=str, allow_nan=False))


def from_dict(kind: type[T], values: dict[str, Any]) -> T:
    """Make settings from plain values: the inverse of `to_dict`.

    Args:
        kind: a settings dataclass; it may list the former names of its fields in `FORMER_FIELDS`, old -> new; "" for a
            field that is gone, whose value is ignored.
        values: field -> value; fields that are left out keep their defaults.

    Returns:
        The settings, an instance of `kind`.

    Raises:
        SettingsError: `kind` has no such field, a field without default is missing, or `kind` refuses a value.
    """
    hints = typing.get_type_hints(kind)
    renamed: dict[str, str] = getattr(kind, "FORMER_FIELDS", {})
    values = {renamed.get(name, name): value for name, value in values.items() if renamed.get(name, name)}
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


def overridden(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Settings as plain values with some of them replaced, groups of settings one by one.

    Args:
        defaults: of `to_dict`.
        values: field -> value, or -> a dictionary of some of the fields of a group.

    Returns:
        The same as `defaults`, but for what `values` names.
    """
    both = {
        name: overridden(defaults[name], value)
        for name, value in values.items()
        if isinstance(value, dict) and isinstance(defaults.get(name), dict)
    }
    return {**defaults, **values, **both}


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
    """Refuse an unknown choice as soon as the settings are made, not hours later in the stage that uses it.

    Args:
        name: of the setting, for the message.
        value: to check.
        choices: two or more allowed values.

    Raises:
        SettingsError: `value` is not among `choices`; the message names the nearest choice.
    """
    if value not in choices:
        near = difflib.get_close_matches(value, choices, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise SettingsError(f"{name} is {value!r}", f"{hint}choose {', '.join(choices[:-1])} or {choices[-1]}")


def fingerprint(*parts: Any) -> str:
    """A key of everything that made an output.

    Args:
        parts: settings dataclasses or JSON values; a dataclass counts with its name and all of its fields, so that no
            field can be forgotten.

    Returns:
        The first 16 hex digits of the SHA-256 of all parts.
    """
    text = json.dumps([_plain(part) for part in parts], sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def number_of(name: str) -> int:
    """A seed for what is drawn for one slide, the same on every machine (`hash` of text changes between processes).

    Args:
        name: of the slide.

    Returns:
        A number in [0, 2**64).
    """
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "little")


def _plain(part: Any) -> Any:
    if not dataclasses.is_dataclass(part):
        return part
    # A renamed class keeps its former name in fingerprints, so that outputs of earlier versions stay valid.
    return [getattr(part, "FORMER_NAME", type(part).__name__), to_dict(part)]


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """List the settings that differ between two resolved dictionaries.

    Args:
        old: one set of settings, as `to_dict` gives it.
        new: the other.
        prefix: put in front of every name.

    Returns:
        One `name: old -> new` per difference, sorted by name; nested names are joined by dots.
    """
    found = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a} -> {b}")
    return found
