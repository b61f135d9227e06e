"""Whether something fits into memory at all, told before it is allocated: the system grants more than there is, and then ends
the process that uses it."""

import os

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # control groups 2 and 1


def machine_memory() -> int | None:
    """Bytes of memory that this process may use: the machine's, or what its control group allows. None: unknown."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows
        return None
    for path in _LIMITS:
        try:
            with open(path) as file:
                text = file.read().strip()
        except OSError:
            continue
        if text.isdigit():
            return min(total, int(text))
    return total


def check_fits(n_bytes: int, what: str) -> None:
    """Raise MemoryError when `what` takes more bytes than the machine has."""
    there = machine_memory()
    if there is not None and n_bytes > there:
        raise MemoryError(f"{what} takes at least {n_bytes / 2**30:,.1f} GiB, and there are {there / 2**30:,.1f} GiB")
