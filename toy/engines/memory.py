"""Whether something fits into memory at all, told before it is allocated: the system grants more than there is, and then ends
the process that uses it."""

import os

from ggml_bridge import machine
from toy.config import ModelConfig


def machine_memory() -> int | None:
    """Bytes of memory that this process may use: the machine's, or what its control group allows. None: unknown."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows
        return None
    return machine.memory_limit(total)


# in the order of machine.LIMITS
_USES = ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")


def free_memory() -> int | None:
    """Bytes of memory that this process may still take: what the machine can give without swapping, within what its control
    group leaves. None: unknown (not on Linux)."""
    try:
        with open("/proc/meminfo") as file:
            free = next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None
    for limit, use in zip(machine.LIMITS, _USES):
        try:
            with open(limit) as file, open(use) as used:
                free = min(free, int(file.read()) - int(used.read()))
        except (OSError, ValueError):  # no control groups, or "max"
            continue
    return max(free, 0)


def kept_numbers(c: ModelConfig, everything: bool) -> int:
    """About how many numbers a block keeps for its backward, for each row. everything: also those that are cheap to compute
    again, outputs of norms and activations."""
    q = c.n_heads * c.d_head
    kv = c.d_head * getattr(c, "n_kv_heads", c.n_heads)
    gated = hasattr(c, "n_kv_heads")  # Llama: two matrices into the MLP, and RoPE, whose input nothing keeps
    least = 2 * c.d_model + 2 * q + 2 * kv + (2 if gated else 1) * c.d_ff
    return least + (2 * c.d_model + c.d_ff if everything else 0)


def check_fits(n_bytes: int, what: str) -> None:
    """Raise MemoryError when `what` takes more bytes than the machine has."""
    there = machine_memory()
    if there is not None and n_bytes > there:
        raise MemoryError(f"{what} takes at least {n_bytes / 2**30:,.1f} GiB, and there are {there / 2**30:,.1f} GiB")
