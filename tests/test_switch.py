"""The one switch: argument, use_backend, set_backend, TOY_BACKEND, auto; and errors that say how to get a backend."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

import toy
from toy import switch

ROOT = Path(toy.__file__).parent.parent


@pytest.fixture(autouse=True)
def no_ambient_choice(monkeypatch):
    monkeypatch.delenv("TOY_BACKEND", raising=False)
    monkeypatch.setattr(switch, "_global_choice", "auto")


def test_the_order_of_the_switches(monkeypatch, backend):
    name = backend.name
    monkeypatch.setenv("TOY_BACKEND", name)
    assert switch.resolve().backend == name and "TOY_BACKEND" in switch.resolve().reason
    toy.set_backend("numpy")
    assert switch.resolve().backend == "numpy" and "set_backend" in switch.resolve().reason
    with toy.use_backend(name):
        assert switch.resolve().backend == name and "use_backend" in switch.resolve().reason
        assert switch.resolve("numpy").backend == "numpy"
    assert switch.resolve().backend == "numpy"


def test_auto_inside_use_backend_is_auto(monkeypatch):
    monkeypatch.setenv("TOY_BACKEND", "numpy")
    with toy.use_backend("auto"):
        assert switch.resolve().reason.startswith("auto")


def test_auto_picks_the_first_available_and_says_why(monkeypatch):
    rows = [row for row in toy.backends() if row.available]
    choice = switch.resolve()
    assert choice.backend == rows[0].name and "fastest available" in choice.reason

    real = switch._describe

    def only_numpy(name):
        return real(name)._replace(available=name == "numpy", reason="" if name == "numpy" else "it was never built")

    monkeypatch.setattr(switch, "_describe", only_numpy)
    choice = switch.resolve()
    assert choice.backend == "numpy" and "it was never built" in choice.reason
    with pytest.raises(toy.BackendUnavailableError, match="it was never built"):
        toy.recipes.FromScratch(backend="cython")


@pytest.mark.parametrize("use", [toy.set_backend, lambda name: toy.use_backend(name).__enter__(), switch.resolve])
def test_an_unknown_name_lists_the_known_ones(use):
    with pytest.raises(ValueError, match=r"'nunpy'.*auto, .*numpy"):
        use("nunpy")


def test_an_unknown_name_in_the_variable_names_the_variable(monkeypatch):
    monkeypatch.setenv("TOY_BACKEND", "nunpy")
    with pytest.raises(ValueError, match="TOY_BACKEND"):
        toy.recipes.FromScratch()


@pytest.mark.parametrize("name", ["numpy", "cython"])
def test_a_device_the_backend_does_not_have(name):
    if name not in [row.name for row in toy.backends() if row.available]:
        pytest.skip(f"{name} is not built")
    with pytest.raises(ValueError, match="'metal'"):
        toy.recipes.FromScratch(backend=name, device="metal")


@pytest.fixture
def thread_counts():
    """Undo what a test sets."""
    before, told = {row.name: row.threads for row in toy.backends()}, switch._n_threads
    yield
    toy.set_num_threads(max(before["numpy"], before["cython"] or 1))
    switch._n_threads = told


@pytest.mark.usefixtures("thread_counts")
def test_one_thread_count_for_every_backend(monkeypatch):
    for n in (1, 2):
        toy.set_num_threads(n)
        assert {row.threads for row in toy.backends() if row.available} == {n}
    monkeypatch.setattr(switch, "_n_threads", None)
    monkeypatch.setenv("TOY_NUM_THREADS", "1")
    switch.resolve("numpy")
    assert next(row.threads for row in toy.backends() if row.name == "numpy") == 1
    monkeypatch.setattr(switch, "_n_threads", None)
    monkeypatch.setenv("TOY_NUM_THREADS", "two")
    with pytest.raises(ValueError, match=r"TOY_NUM_THREADS.*'two'"):
        switch.resolve("numpy")
    for wrong in (0, -1, 1.5, "2", True):
        with pytest.raises(ValueError, match="number of threads"):
            toy.set_num_threads(wrong)


NO_KERNELS = """
import sys
sys.modules["toy._kernels.cpu"] = None
import toy
from toy import switch
print(switch.resolve().reason)
for choice in (switch.resolve(), switch.resolve("numpy")):
    print([switch.missing_kernels_notice(choice)])
"""


def test_who_gets_numpy_without_asking_is_told_what_to_do():
    """pip hides what setup.py said when there was no compiler: the program says it, in one line."""
    result = subprocess.run([sys.executable, "-c", NO_KERNELS], capture_output=True, text=True, cwd=ROOT)
    reason, got, asked = result.stdout.splitlines()
    assert asked == "['']"
    assert "on numpy, several times slower" in got and "install a C compiler, then pip install --force-reinstall" in got
    assert got.count("pip install") == 1 and "\\n" not in got
    assert reason.count("not built") == 1, "the same reason for two backends is said once"


def test_nobody_is_told_who_has_the_kernels_or_wants_none():
    row = next(row for row in toy.backends() if row.name == "cython")
    if not row.available:
        pytest.skip("the kernels are not built")
    assert switch.missing_kernels_notice(switch.resolve()) == ""
    assert switch.missing_kernels_notice(switch.Resolved("numpy", "cpu", "auto: the fastest available")) == ""


def test_use_backend_stays_in_its_thread():
    seen = []
    with toy.use_backend("numpy"):
        thread = threading.Thread(target=lambda: seen.append(switch.resolve().reason))
        thread.start()
        thread.join()
    assert seen[0].startswith("auto")


def test_backends_lists_every_name_with_a_reason_where_it_is_missing():
    rows = toy.backends()
    assert {row.name for row in rows} == set(switch.BACKEND_NAMES) - {"auto"}
    assert all(bool(row.reason) != row.available for row in rows)
    assert next(row for row in rows if row.name == "numpy").available


def test_models_follow_the_switch(backend):
    name = backend.name
    if name not in switch._TABLES:
        pytest.skip("models run on the eager tables")
    with toy.use_backend(name):
        assert toy.TransformerLM(5, 4, 8, 2, 1, 4).ops is switch.ops_for(name)
