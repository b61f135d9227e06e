"""Nothing that Python calls may end the process; sessions are independent, leave nothing behind and say when misused."""

import contextlib
import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from bridge_support import needs_ggml

import ggml_bridge

pytestmark = needs_ggml

FUZZ = Path(__file__).parent / "bridge_fuzz.py"
ROOT = FUZZ.parent.parent


def run_python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )


def last_program(log):
    """The last program of a fuzz log, for the message of a failing test."""
    return log.read_text(encoding="utf-8").rpartition("# example\n")[2][-6000:] if log.exists() else "(no log)"


@pytest.mark.parametrize("level", ["graph", "session"])
def test_random_programs_end_in_exceptions_only(level, tmp_path, pytestconfig):
    log = tmp_path / "program.py"
    thorough = pytestconfig.getoption("--hypothesis-profile") == "thorough"
    result = run_python(FUZZ, log, level, 3000 if thorough else 150)
    assert result.returncode == 0, (
        f"exit code {result.returncode}\n--- the program\n{last_program(log)}\n--- stderr\n{result.stderr[-3000:]}"
    )
    # the programs are worth running: they compute, and they are refused, in large numbers
    lines = log.read_text(encoding="utf-8").splitlines()
    run = "g.compute()" if level == "graph" else "s.compute_backward()"
    computed = sum(line == run and not after.startswith("# ") for line, after in itertools.pairwise(lines))
    refused = sum(line.startswith(("# ValueError", "# TypeError", "# RuntimeError")) for line in lines)
    assert computed > 30 and refused > 300


def test_the_fuzz_test_would_notice(tmp_path):
    """An abort inside a program is seen by the parent, and the log names the line."""
    log = tmp_path / "program.py"
    script = (
        "import sys, os; sys.path.insert(0, sys.argv[1]); import bridge_fuzz\n"
        "def abort(program):\n"
        "    program.run('s = ggml_bridge.Backend()')\n"
        "    program.space['os'] = os\n"
        "    program.run('os.abort()')\n"
        "bridge_fuzz.EXAMPLES['abort'] = (abort, 'g')\n"
        "bridge_fuzz.main(sys.argv[2], 'abort', 1)\n"
    )
    result = run_python("-c", script, FUZZ.parent, log)
    assert result.returncode != 0
    assert last_program(log).splitlines()[-1] == "os.abort()"


# ----------------------------------------------------------------------------------------------------------------------
# several sessions
# ----------------------------------------------------------------------------------------------------------------------


class Trainer:
    """A small training session; `run(steps)` returns the losses."""

    def __init__(self, seed, n_threads=1):
        self.rng = np.random.default_rng(seed)
        s = self.session = ggml_bridge.Session(n_threads=n_threads)
        self.w = s.input_2d_f32_persistent(11, 8)
        s.set_param(self.w)
        s.finalize_weights()
        s.upload_row_major(self.w, self.rng.normal(size=(11, 8)))
        self.ids, self.labels, self.hp = s.input_1d_i32(6), s.input_1d_i32(6), s.input_2d_f32(1, 7)
        self.loss = s.cross_entropy_loss(s.matmul(self.w, s.gelu(s.get_rows(self.w, self.ids))), self.labels)
        s.set_loss(self.loss)
        s.build_backward()
        s.opt_step_adamw(self.w, self.hp)
        s.realize_backward()
        self.steps = 0

    def step(self):
        s = self.session
        s.graph_reset() if self.steps == 0 else s.graph_reset_grads_only()
        self.steps += 1
        s.upload_int_array(self.ids, self.rng.integers(0, 11, 6))
        s.upload_int_array(self.labels, self.rng.integers(-1, 11, 6))
        s.upload_row_major(self.hp, [[1e-2, 0.9, 0.95, 1e-8, 0, 1, 1]])
        s.compute_backward()
        return float(s.download(self.loss)[0])

    def run(self, steps):
        return [self.step() for _ in range(steps)]


def alone(seed, steps):
    trainer = Trainer(seed)
    with trainer.session:
        return trainer.run(steps)


def test_two_sessions_interleaved():
    first, second = Trainer(1), Trainer(2, n_threads=2)
    losses = [(first.step(), second.step()) for _ in range(10)]
    second.session.close()
    rest = first.run(5)
    assert [a for a, _ in losses] + rest == alone(1, 15)
    assert np.allclose([b for _, b in losses], alone(2, 10), rtol=1e-6)
    with pytest.raises(ValueError, match="another session"):
        first.session.upload_row_major(Trainer(3).w, np.zeros((11, 8)))
    with pytest.raises(RuntimeError, match="closed"):
        first.session.zero_tensor(second.w)
    first.session.close()


def test_sessions_in_threads():
    results = {}

    def work(seed):
        results[seed] = alone(seed, 30)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(results[seed] == alone(seed, 30) for seed in range(4))


def slow_graph(backend, n=400, nodes=60):
    g = backend.graph()
    x = g.input((n, n))
    y = x
    for _ in range(nodes):
        y = g.scale(g.mul_mat(x, y), 1 / n)
    g.output(y)
    g.allocate()
    x.upload(np.ones((n, n)))
    return g, x, y


def test_one_session_in_two_threads_is_refused_clearly():
    with ggml_bridge.Backend("cpu", 1) as backend:
        g, x, y = slow_graph(backend)
        stop = threading.Event()

        def compute():
            while not (stop.is_set() or g.closed):
                with contextlib.suppress(RuntimeError):  # the other thread has it, or has closed it
                    g.compute()

        def busy(call):
            try:
                call()
            except RuntimeError as error:
                return "busy in another thread" in str(error)
            return False

        thread = threading.Thread(target=compute)
        thread.start()
        try:
            # the other thread computes nearly all of the time: it is found at it before long, however slow the machine
            for call in (g.compute, y.download, backend.graph, lambda: x.upload(np.ones((400, 400)))):
                assert any(busy(call) for _ in range(10_000)), call
            for call in (g.close, backend.close):  # refused, or done between two computations
                assert busy(call) or g.closed or backend.closed, call
        finally:
            stop.set()
            thread.join()


def test_computing_releases_the_gil():
    with ggml_bridge.Backend("cpu", 1) as backend:
        g, *_ = slow_graph(backend)
        g.compute()
        ticks, stop = [], threading.Event()

        def tick():
            while not stop.is_set():
                ticks.append(time.perf_counter())
                time.sleep(1e-3)

        thread = threading.Thread(target=tick)
        thread.start()
        # were the GIL held, nothing would tick inside a computation; on a busy machine it takes some of them to see that
        most = 0
        for _ in range(200):
            start = time.perf_counter()
            g.compute()
            end = time.perf_counter()
            most = max(most, sum(start < t < end for t in ticks))
            if most >= 3:
                break
        stop.set()
        thread.join()
    assert most >= 3


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_ctrl_c_is_answered_between_computations():
    with ggml_bridge.Backend("cpu", 1) as backend:
        g, _, y = slow_graph(backend, n=100)
        g.compute()
        first = y.download()
        sent = threading.Event()

        def press():
            os.kill(os.getpid(), signal.SIGINT)
            sent.set()

        timer = threading.Timer(0.1, press)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            afterwards = 0  # computations after Ctrl-C
            while afterwards < 5:
                afterwards += sent.is_set()
                g.compute()
        timer.join()
        g.compute()  # the session goes on
        assert np.array_equal(y.download(), first)


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("how", ["closed", "forgotten"])
def test_200_sessions_leave_nothing_behind(how):
    def one():
        trainer = Trainer(0)
        trainer.run(2)
        other = ggml_bridge.Backend("cpu", 2)  # with a worker thread
        if how == "closed":
            trainer.session.close()
            other.close()

    def threads():
        return len(os.listdir("/proc/self/task"))

    for _ in range(20):
        one()
    gc.collect()
    before, threads_before = resident_bytes(), threads()
    for _ in range(200):
        one()
    gc.collect()
    assert resident_bytes() - before < 2 * 2**20
    assert threads() == threads_before


def test_a_forked_child_is_told_to_open_its_own():
    script = (
        "import os, sys, numpy as np, ggml_bridge\n"
        "backend = ggml_bridge.Backend('cpu', 2)\n"
        "g = backend.graph(); x = g.input((3,)); y = g.output(g.exp(x)); g.allocate(); x.upload(np.zeros(3)); g.compute()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    try:\n"
        "        g.compute()\n"
        "    except RuntimeError as error:\n"
        "        backend.close()\n"  # does not wait for threads that do not exist
        "        os._exit(7 if 'fork' in str(error) else 1)\n"
        "    os._exit(2)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7\n"
        "g.compute()\n"
    )
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    result = run_python("-c", script)
    assert result.returncode == 0, result.stderr


def test_close_is_idempotent_and_final():
    trainer = Trainer(0)
    session = trainer.session
    session.close()
    session.close()
    assert session.closed
    for call in (trainer.step, session.explain, lambda: session.input_1d_i32(3), lambda: trainer.w.shape):
        with pytest.raises(RuntimeError, match="closed"):
            call()
    assert "closed" in repr(trainer.w)


def test_threads_can_be_set():
    trainer = Trainer(0, n_threads=1)
    losses = trainer.run(3)
    trainer.session.n_threads = 2
    assert trainer.session.n_threads == 2
    losses += trainer.run(3)
    trainer.session.n_threads = 1
    assert np.allclose(losses + trainer.run(3), alone(0, 9), rtol=1e-6)
    for wrong in (0, -1, 10**6, 1.5, None, "x"):
        with pytest.raises(ValueError, match="number of threads"):
            trainer.session.n_threads = wrong
    trainer.session.close()


def test_the_default_number_of_threads(monkeypatch):
    monkeypatch.setenv("TOY_NUM_THREADS", "2")
    with ggml_bridge.Session() as s:
        assert s.n_threads == 2
    monkeypatch.setenv("TOY_NUM_THREADS", "many")
    with pytest.raises(ValueError, match=r"TOY_NUM_THREADS.*'many'"):
        ggml_bridge.Session()


def test_more_memory_than_there_is():
    with ggml_bridge.Backend("cpu", 1) as backend:
        total = next(device.memory_total for device in ggml_bridge.devices() if device.kind == "cpu")
        rows = 2**13
        for _ in range(total // (rows * rows * 4) + 1):
            backend.persistent((rows, rows))
        with pytest.raises(MemoryError, match="bytes are needed on CPU"):
            backend.allocate()
    with ggml_bridge.Backend("cpu", 1) as backend:
        g = backend.graph()
        column, row = g.input((2**15, 1)), g.input((1, 2**15))
        for _ in range(total // 2**32 + 2):
            g.output(g.mul_mat(column, g.cont(g.transpose(row))))
        with pytest.raises(MemoryError, match="bytes are needed on CPU"):
            g.allocate()
