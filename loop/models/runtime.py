"""Where and how precisely networks run."""

from contextlib import AbstractContextManager

import numpy as np
import torch

from loop.errors import ConfigError
from loop.types import FloatArray, UInt8Array


def to_input(stretched: UInt8Array) -> FloatArray:
    """(H, W, C) uint8 to what a network takes: (C, H, W) float32 in [0, 1]."""
    return np.ascontiguousarray(stretched.transpose(2, 0, 1), dtype=np.float32) / np.float32(255)


def resolve_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first GPU where there is one, else the CPU.

    Raises:
        ConfigError: the name is none of auto, cpu, cuda, or there is no GPU.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device={name!r}; expected auto, cpu or cuda")
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ConfigError("device=cuda, but torch sees no GPU; use device: auto, or install a GPU build of torch")
    return torch.device("cuda" if has_gpu and name != "cpu" else "cpu")


def uses_bf16(device: torch.device, precision: str) -> bool:
    """Whether a net runs under bfloat16 autocast: as asked, and for "auto" where the device computes it natively.

    Native: a GPU that says so; a CPU with AVX512-BF16 or AMX (2 to 3 times faster there, slower elsewhere).
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """The context in which a net runs on `device` in `precision`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(device, precision))
