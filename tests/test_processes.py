"""The watch over other processes: it lets a slow one live and finds one that has hung."""

import subprocess
import sys
import threading

import processes
import pytest

pytestmark = pytest.mark.skipif(processes.processor_seconds(1) is None, reason="seen in /proc alone")

HANGS = "import time; time.sleep(10000)"
WORKS = "n = 0\nwhile n < 30_000_000:\n    n += 1\nprint('done')"
CHILD_WORKS = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WORKS!r}])"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(processes, "EVERY", 0.5)
    monkeypatch.setattr(processes, "PATIENCE", 3)


def start(code):
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("how", [processes.finish, processes.wait])
def test_a_process_that_does_nothing_has_hung(how):
    process = start(HANGS)
    with pytest.raises(AssertionError, match="hung"):
        how(process)
    assert process.returncode != 0
    process.communicate()


@pytest.mark.parametrize("code", [WORKS, CHILD_WORKS])
def test_a_process_that_works_or_waits_for_one_that_works_is_left_alone(code):
    assert processes.finish(start(code)) == ("done\n", "")


def test_a_watch_from_another_thread_kills_what_hangs():
    process, done = start(HANGS), threading.Event()
    thread = processes.kill_if_it_hangs(process.pid, done)
    process.communicate()
    assert process.returncode != 0
    done.set()
    thread.join()
