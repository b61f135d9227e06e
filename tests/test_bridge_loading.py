"""Finding libggml, and what is said when it is missing, of another version or not for this processor."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bridge_support import PURE, needs_ggml

import ggml_bridge
from ggml_bridge import loading

pytestmark = needs_ggml


def run(code, **environment):
    root = str(Path(__file__).parent.parent)
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": root} | environment,
    )


def libraries():
    (place,) = importlib.util.find_spec("libggml").submodule_search_locations
    return next(Path(place) / name for name in ("lib64", "lib", "bin") if (Path(place) / name).is_dir())


def test_the_bridge_was_built():
    assert not PURE
    ok, reason = ggml_bridge.available()
    assert ok, reason


def test_importing_loads_nothing():
    result = run("import sys, ggml_bridge; assert 'ggml_bridge.core' not in sys.modules and 'numpy' not in sys.modules")
    assert result.returncode == 0, result.stderr


def test_asking_initialises_no_device():
    code = (
        "import ggml_bridge; print(ggml_bridge.available()); from ggml_bridge import core\n"
        "try: core.Backend()\nexcept RuntimeError as error: print(error)"
    )
    result = run(code)
    assert "(True, 'ggml 0.20" in result.stdout and "not loaded" in result.stdout


def test_without_libggml():
    code = "import sys; sys.modules['libggml'] = None; import ggml_bridge; print(*ggml_bridge.available())"
    block = "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'libggml' else f(n, *a); "
    result = run(block + code.replace("sys.modules['libggml'] = None; ", ""), TOY_GGML_DIR="")
    assert result.stdout.startswith("False the package libggml-python is not installed; pip install"), result.stderr


def test_without_the_compiled_part():
    code = (
        "import sys; sys.modules['ggml_bridge.core'] = None\n"
        "import ggml_bridge\nprint(ggml_bridge.available())\n"
        "try: ggml_bridge.Session()\nexcept ggml_bridge.LoadError as error: print('LoadError', error)"
    )
    result = run(code)
    assert '(False, "the compiled part of ggml_bridge is missing' in result.stdout
    assert "LoadError the compiled part" in result.stdout and "pip install" in result.stdout


def test_one_text_for_building_again():
    """The command of the kernels, also where they are missing too; and where the library does not fit."""
    from toy._kernels import rebuild_command

    block = "import sys; sys.modules['ggml_bridge.core'] = None\n"
    show = "import ggml_bridge; print(*ggml_bridge.available())"
    for others in ("", "sys.modules['toy._kernels.cpu'] = None\n"):
        printed = run(block + others + show).stdout
        assert printed.count(rebuild_command()) == 1, printed
        assert printed.count(loading.INSTALL) == 1 and "C compiler" in printed
        assert ("kernels of toy are not built" in printed) == bool(others)
    with pytest.raises(ggml_bridge.LoadError) as caught:
        loading.check_version("0.20.2", "0.21.0")
    assert rebuild_command() in str(caught.value)


@pytest.mark.skipif(sys.platform == "win32", reason="links files")
def test_a_build_of_ones_own(tmp_path):
    """TOY_GGML_DIR names the build or its library directory; the libraries there are used, not the package's."""
    own = tmp_path / "build" / "lib"
    own.mkdir(parents=True)
    for file in libraries().glob("lib*"):
        if file.is_file():
            (own / file.name).write_bytes(file.read_bytes())
    for directory in (own, own.parent):
        result = run(
            "import ggml_bridge; print(*ggml_bridge.available()); ggml_bridge.Session().close()", TOY_GGML_DIR=directory
        )
        assert f"from {own}" in result.stdout, result.stderr
        assert result.returncode == 0


def test_a_directory_without_libraries(tmp_path):
    result = run("import ggml_bridge; print(*ggml_bridge.available())", TOY_GGML_DIR=str(tmp_path))
    assert result.stdout.startswith(f"False TOY_GGML_DIR={tmp_path} holds no ")


@pytest.mark.skipif(sys.platform == "win32", reason="file names")
def test_a_library_that_is_none(tmp_path):
    for name in ("ggml-base", "ggml-cpu", "ggml"):
        suffix = "dylib" if sys.platform == "darwin" else "so"
        (tmp_path / f"lib{name}.{suffix}").write_bytes(b"not a library")
    result = run("import ggml_bridge; print(*ggml_bridge.available())", TOY_GGML_DIR=str(tmp_path))
    assert result.stdout.startswith(f"False cannot open {tmp_path}"), result.stderr


def test_versions_must_agree():
    loading.check_version("0.20.2", "0.20.5")
    with pytest.raises(ggml_bridge.LoadError) as caught:
        loading.check_version("0.20.2", "0.21.0")
    for part in ("0.20.2", "0.21.0", "pip install"):
        assert part in str(caught.value)


def test_missing_functions_are_named():
    with pytest.raises(ggml_bridge.LoadError, match="lacks ggml_no_such_function"):
        loading.addresses(loading.open_libraries(libraries()), ["ggml_version", "ggml_no_such_function"])


def test_processor_check(monkeypatch):
    monkeypatch.delenv("TOY_GGML_DIR", raising=False)

    class Wheel:
        def __init__(self, tag):
            self.tag = tag

        def read_text(self, name):
            return f"Tag: py3-none-{self.tag}"

    def missing(features, tag):
        monkeypatch.setattr(loading.importlib.metadata, "distribution", lambda name: Wheel(tag))
        return loading.missing_cpu_features(features)

    prebuilt = "manylinux_2_27_x86_64"
    assert missing(7, prebuilt) == []
    assert missing(0, prebuilt) == ["AVX2", "FMA", "F16C"]
    assert missing(1 | 4, prebuilt) == ["FMA"]
    assert missing(-1, prebuilt) == []  # another kind of processor
    assert missing(0, "linux_x86_64") == []  # compiled on this machine
    monkeypatch.setenv("TOY_GGML_DIR", "/somewhere")
    assert missing(0, prebuilt) == []


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="reads /proc/cpuinfo")
def test_processor_features_against_the_system():
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), None)
    if flags is None:
        pytest.skip("not an x86 processor")
    flags = flags.split()
    features = ggml_bridge.load().x86_features()
    for bit, name in loading.X86_FEATURES.items():
        assert bool(features & bit) == (name.lower() in flags)


def test_the_error_for_an_old_processor():
    code = (
        "import ggml_bridge; from ggml_bridge import loading\n"
        "loading.missing_cpu_features = lambda features: ['AVX2', 'FMA']\n"
        "print(*ggml_bridge.available())"
    )
    result = run(code)
    assert result.stdout.startswith(
        "False the prebuilt ggml needs AVX2, FMA, which this processor lacks; build ggml here"
    )
