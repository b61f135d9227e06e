"""What the machine gives this process, beside what ggml says of its devices."""

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # control groups 2 and 1


def memory_limit(total: int) -> int:
    """Bytes that this process may use of the `total` that the machine has: all, or what its control group allows."""
    for path in LIMITS:
        try:
            with open(path) as file:
                text = file.read().strip()
        except OSError:
            continue
        if text.isdigit():
            return min(total, int(text))
    return total
