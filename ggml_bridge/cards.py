"""What ggml's CUDA backend would answer by ending the process, asked beforehand.

A kernel that was not compiled for the card's architecture, and memory that a kernel takes for itself and does not get, are
`abort()` there.
"""

import ctypes
import re
import sys

from ggml_bridge.records import Device

# bytes that stay free on a card: cuBLAS takes 32 MB of workspace on newer cards, reductions and the captured graph some more
KEPT_FREE = 256 * 2**20

DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h


def compute_capability(index: int) -> tuple[int, int] | None:
    """(9, 0) of the card with this number among those that CUDA_VISIBLE_DEVICES leaves; None where the driver tells none."""
    try:
        driver = ctypes.CDLL(DRIVER)
        card, found = ctypes.c_int(), []
        if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(card), index):
            return None
        for attribute in (MAJOR, MINOR):
            value = ctypes.c_int()
            if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, card):
                return None
            found.append(value.value)
    except (OSError, AttributeError):
        return None
    return found[0], found[1]


def check_architecture(device: Device, compiled: str) -> None:
    """Raise RuntimeError unless this ggml has code for the card.

    compiled: the architectures of the build as it tells them, "750,900" for 7.5 and 9.0. Code for one runs on all newer
    ones (the driver translates it). Nothing is raised where the card or the build do not say.
    """
    architectures = sorted(int(text) for text in re.findall(r"\d+", compiled))
    index = re.search(r"\d+$", device.name)
    capability = compute_capability(int(index[0])) if index else None
    if not architectures or capability is None:
        return
    major, minor = capability
    if 100 * major + 10 * minor < architectures[0]:
        have = ", ".join(f"{a // 100}.{a % 100 // 10}" for a in architectures)
        raise RuntimeError(
            f"{device.name} ({device.description}) is of architecture {major}.{minor}, older than what this ggml was "
            f"compiled for ({have}): build one for it (`python -m ggml_bridge.build cuda --architecture {major}{minor}`) "
            "and set TOY_GGML_DIR to what that prints"
        )
