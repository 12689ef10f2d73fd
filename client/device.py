"""Which device trains: chosen by itself, or named in the study."""

from __future__ import annotations

import torch
from oncofed.common.errors import Refusal


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA, then MPS, then CPU; a named device that is not there is refused."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise Refusal(
            f"runtime.device = {name!r} is not available here; use 'auto', 'cpu' or a device of this machine"
        ) from None
    return device


def describe(device: torch.device) -> str:
    """The device in words, for the log."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)
