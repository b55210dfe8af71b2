"""Where a network computes and in which number format."""

from __future__ import annotations

import contextlib
import ctypes

import torch

from histossl.core.errors import SettingsError


def pick_device(device: str) -> torch.device:
    """`auto` is the GPU where there is one, else the CPU.

    Raises:
        SettingsError: the device is unknown or absent.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise SettingsError(f"unknown device {device!r}", "use auto, cpu or cuda") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise SettingsError(f"device {device!r} asked for, but torch sees no GPU here", "use --device cpu")
    return found


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it natively, else float32.

    A recent GPU does, and a CPU with AMX or AVX-512 BF16 (twice as fast there).

    Raises:
        SettingsError: `precision` is not auto, float32 or bfloat16.
    """
    if precision == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
        native = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return torch.bfloat16 if any(getattr(torch.cpu, name, bool)() for name in native) else torch.float32
    if precision not in ("float32", "bfloat16"):
        raise SettingsError(f"precision must be auto, float32 or bfloat16, got {precision!r}")
    return getattr(torch, precision)


def keep_buffers() -> None:
    """Have the C library keep the buffers that torch frees, for the next batch.

    By default glibc hands every buffer over a megabyte back to the system and takes it again page by page, which costs
    a third of a forward pass. Does nothing where the library is another.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
