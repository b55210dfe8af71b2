"""The device and the number format that a network computes in."""

from __future__ import annotations

import contextlib
import ctypes

import torch
from torch import Tensor

from histossl.core.errors import SettingsError


def pick_device(device: str) -> torch.device:
    """Find a device by name.

    Args:
        device: auto (the GPU if there is one, else the CPU), cpu, cuda, or another name that torch knows.

    Returns:
        The device.

    Raises:
        SettingsError: torch does not know the name, or sees no GPU although one is requested.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise SettingsError(f"unknown device {device!r}", "use auto, cpu or cuda") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise SettingsError(f"device {device!r} is requested, but torch sees no GPU here", "use --device cpu")
    return found


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Find the number format of matrix products.

    Args:
        precision: float32, bfloat16, or auto: bfloat16 where the hardware multiplies it natively, else float32. Recent
            GPUs do, and CPUs with AMX or AVX-512 BF16 (twice as fast there).
        device: that computes.

    Returns:
        torch.float32 or torch.bfloat16.

    Raises:
        SettingsError: `precision` is not auto, float32 or bfloat16.
    """
    if precision == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
        # The functions are private in torch and missing in some versions: `bool` then answers False.
        native = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return torch.bfloat16 if any(getattr(torch.cpu, name, bool)() for name in native) else torch.float32
    if precision not in ("float32", "bfloat16"):
        raise SettingsError(f"precision must be auto, float32 or bfloat16, got {precision!r}")
    return getattr(torch, precision)


def unrounded(device: torch.device) -> contextlib.AbstractContextManager:
    """Suspend autocast.

    Args:
        device: of the tensors.

    Returns:
        A context in which products are computed in the precision of their factors.
    """
    # torch knows no autocast on the device of the tests, "meta", and raises when asked for it.
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def rounded_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast rounds the factors of products to.

    Args:
        device: of the tensors.

    Returns:
        The dtype; None where autocast is off.
    """
    on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device without waiting for the copy.

    Args:
        tensor: on the CPU.
        device: where it is needed.

    Returns:
        The tensor on the device.
    """
    if device.type == "cuda":  # only from pinned memory is the copy asynchronous
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def keep_buffers() -> None:
    """Make the C library keep the buffers that torch frees, for the next batch.

    By default glibc returns every buffer over a megabyte to the system and gets it again page by page, which costs a
    third of a forward pass. Does nothing with another C library.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
