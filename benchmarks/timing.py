"""What the benchmarks share: contenders that take turns, and the peak memory of a fresh process."""

import json
import os
import subprocess
import sys
import time

PAUSE = 0.25  # seconds before a burst: OpenBLAS's idle threads spin on for 0.13 s, on the processors of whoever is next


def alternate(steps, seconds, burst=0.3):
    """Let the contenders make bursts of steps in turns for about `seconds` each -> dict of lists of seconds per step.

    A burst lasts at least `burst` seconds, and its first step is not counted: the caches are cold. The pause before it lets
    the idle threads of the contender before go to sleep. At least 5 steps are counted.
    """
    for step in steps.values():
        for _ in range(3):
            step()
    times = {name: [] for name in steps}
    start = time.perf_counter()
    while time.perf_counter() - start < seconds * len(steps) or len(next(iter(times.values()))) < 5:
        for name, step in steps.items():
            time.sleep(PAUSE)
            step()
            begin = last = time.perf_counter()
            while last - begin < burst:
                step()
                now = time.perf_counter()
                times[name].append(now - last)
                last = now
    return times


def resident_bytes(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))


def print_peak(make_step, n_steps=4):
    """Print the peak of resident memory while make_step() makes a step and that step is made n_steps times, above what is
    resident now, in bytes (Linux)."""
    before = resident_bytes("VmRSS")
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # reset the high-water mark
    step = make_step()
    for _ in range(n_steps):
        step()
    print(json.dumps(resident_bytes("VmHWM") - before))


def child_figure(arguments, threads):
    """The number that a fresh Python process with these arguments prints, NaN when it fails."""
    command = [sys.executable, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=thread_environment(threads))
    return float(result.stdout) if result.returncode == 0 else float("nan")


def thread_environment(threads):
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "TOY_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, str(threads))}


def restart_with(threads):
    """Start this program anew unless the libraries were loaded with this many threads: they look only once."""
    if os.environ.get("TOY_NUM_THREADS") != str(threads):
        os.execve(sys.executable, [sys.executable, *sys.argv], thread_environment(threads))


def processors():
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
