"""Waiting for other processes without a stop-watch: a process has hung when it does nothing, not when the machine is busy.

On a busy machine a process that has something to do gets little processor time, but it gets some. One that uses next to none
for minutes waits for something that does not come. Elsewhere than on Linux, where this cannot be seen, the limit is an hour.
"""

import contextlib
import os
import signal
import subprocess
import threading
from pathlib import Path

EVERY = 5  # seconds between two looks
PATIENCE = 180  # seconds
LEAST = 0.001  # of a processor, on the mean of that time: what a process uses that only looks round from time to time
HOUR = 3600


def processor_seconds(pid):
    """What a process and its descendants have used so far; None where that cannot be seen."""
    if not Path("/proc/self/stat").exists():
        return None
    parents, used = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            number = int(path.parent.name)
            parents[number], used[number] = (
                int(fields[1]),
                sum(map(int, fields[11:15])),
            )  # with children that have ended
    family, grown = {pid}, True
    while grown:
        children = {child for child, parent in parents.items() if parent in family} - family
        family |= children
        grown = bool(children)
    return sum(used.get(member, 0) for member in family) / os.sysconf("SC_CLK_TCK")


class Watch:
    """Notices that a process has hung: call `idle` from time to time, with the seconds since the last call."""

    def __init__(self, pid):
        self.pid, self.before, self.seconds = pid, processor_seconds(pid), 0.0

    def idle(self, seconds):
        """Whether the process has done nothing for too long."""
        self.seconds += seconds
        if self.before is None:
            return self.seconds >= HOUR
        if self.seconds < PATIENCE:
            return False
        now = processor_seconds(self.pid)
        used, self.before = now - self.before, now
        long, self.seconds = self.seconds, 0.0
        return used < LEAST * long


def finish(process):
    """`process.communicate()` -> (stdout, stderr), and its end; a process that has hung is killed, and fails the test."""
    watch = Watch(process.pid)
    while True:
        try:
            return process.communicate(timeout=EVERY)
        except subprocess.TimeoutExpired:
            if watch.idle(EVERY):
                process.kill()
                out, err = process.communicate()
                raise AssertionError(f"{process.args} hung:\n{out}\n{err}") from None


def wait(process):
    """`process.wait()` -> exit status; a process that has hung is killed, and fails the test."""
    watch = Watch(process.pid)
    while True:
        try:
            return process.wait(timeout=EVERY)
        except subprocess.TimeoutExpired:
            if watch.idle(EVERY):
                process.kill()
                process.wait()
                raise AssertionError(f"{process.args} hung") from None


def kill_if_it_hangs(pid, done):
    """Kill that process, from another thread, if it hangs before the event `done` is set. Returns the thread."""

    def look():
        watch = Watch(pid)
        while not done.wait(EVERY):
            if watch.idle(EVERY):
                os.kill(pid, signal.SIGKILL)
                return

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    return thread
