"""`python -m ggml_bridge.build`: the tools, the card and cmake are played; what is asked of them and said of them is real."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import toy
from ggml_bridge import build
from toy.files.fetch import cache_dir

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the tools are played by shell scripts")

CMAKE = """
echo "cmake $*" >> "$PLAYED/asked"
case $1 in
-S) echo "-- configured"
    if [ -e "$PLAYED/broken" ]; then echo "CMake Error at CMakeLists.txt:7 (message): no such header"; echo more; exit 1; fi
    mkdir -p "$4" && echo "$*" | sed 's/.*-DCMAKE_INSTALL_PREFIX=\\([^ ]*\\).*/\\1/' > "$4/prefix" ;;
--build) echo "[1/2] compiling"; echo "[2/2] linking" ;;
--install) prefix=$(cat "$2/prefix"); mkdir -p "$prefix/lib" "$prefix/include"; touch "$prefix/include/ggml.h" ;;
esac
"""
NVCC = """
case $* in
*list-gpu-arch*) printf 'compute_75\\ncompute_90\\ncompute_120\\n' ;;
*dryrun*) echo "#\\$ TOP=$PLAYED/toolkit" >&2 ;;
esac
"""
NVIDIA_SMI = 'cat "$PLAYED/cards"'


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with every tool, a card of architecture 9.0 and the sdist: -> its directory, with `asked`, `cards`, ..."""
    played = tmp_path / "played"
    (played / "bin").mkdir(parents=True)
    (played / "toolkit" / "lib64").mkdir(parents=True)
    (played / "toolkit" / "lib64" / "libcublas.so").touch()
    (played / "cards").write_text("9.0\n12.0\n")
    for name, text in (
        ("cmake", CMAKE),
        ("nvcc", NVCC),
        ("nvidia-smi", NVIDIA_SMI),
        ("ninja", ""),
        ("c++", ""),
        ("glslc", ""),
    ):
        program = played / "bin" / name
        program.write_text(f"#!/bin/sh\n{text}")
        program.chmod(0o755)
    for tool in ("sh", "cat", "sed", "mkdir", "touch", "true"):
        (played / "bin" / tool).symlink_to(next(p for p in (Path("/bin", tool), Path("/usr/bin", tool)) if p.exists()))
    monkeypatch.setenv("PATH", str(played / "bin"))
    monkeypatch.setenv("PLAYED", str(played))
    monkeypatch.setenv("TOY_CACHE", str(tmp_path / "cache"))
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(played / "bin"))
    which = build.shutil.which
    toolkit = "/usr/local/cuda/bin"  # that of this machine is not seen
    monkeypatch.setattr(
        build.shutil, "which", lambda name, path=None: None if path == toolkit else which(name, path=path)
    )
    return played


@pytest.fixture
def sdist(tmp_path):
    return make_sdist(tmp_path, f"libggml_python-{build.VERSION}/ggml/CMakeLists.txt")


def make_sdist(folder, member):
    (folder / "CMakeLists.txt").write_text("project(ggml)\n")
    path = folder / "sources.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder / "CMakeLists.txt", member)
    return path


def asked(machine):
    return (machine / "asked").read_text()


def test_cuda_from_a_file_without_a_network(machine, sdist, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(build, "_download", lambda folder: pytest.fail("nothing is downloaded"))
    assert build.main(["cuda", "--sdist", str(sdist), "--jobs", "3"]) == 0
    place = tmp_path / "cache" / f"ggml-{build.VERSION}-cuda-90"
    assert capsys.readouterr().out == f"TOY_GGML_DIR={place}\n"
    assert (place / "include" / "ggml.h").exists() and [p.name for p in place.parent.iterdir()] == [place.name]
    configured, compiled, _ = asked(machine).splitlines()
    for setting in (
        "GGML_CUDA=ON", "GGML_CUDA_GRAPHS=ON", "GGML_CUDA_FA=OFF", "GGML_CUDA_NO_VMM=ON", "GGML_CUDA_NCCL=OFF",
        "CMAKE_CUDA_ARCHITECTURES=90 ", f"CMAKE_CUDA_COMPILER={machine}/bin/nvcc", "GGML_NATIVE=ON", "BUILD_SHARED_LIBS=ON",
        f"CMAKE_INSTALL_RPATH=$ORIGIN;{machine}/toolkit/lib64",
    ):  # fmt: skip
        assert f"-D{setting}" in configured
    assert "--parallel 3" in compiled
    # a build that is there is used again
    (machine / "asked").unlink()
    assert build.main(["cuda"]) == 0
    assert capsys.readouterr().out == f"TOY_GGML_DIR={place}\n" and not (machine / "asked").exists()


def test_vulkan_portable_and_a_place_of_ones_own(machine, sdist, tmp_path):
    (machine / "bin" / "nvcc").unlink()  # not needed
    place = build.build("vulkan", sdist, into=tmp_path / "mine", portable=True)
    assert place == tmp_path / "mine" and (place / "lib").is_dir()
    assert (
        "-DGGML_VULKAN=ON" in asked(machine) and "-DGGML_NATIVE=OFF" in asked(machine) and "CUDA" not in asked(machine)
    )
    header = asked(machine).partition("-DCMAKE_CXX_FLAGS=-include ")[2].split()[0]
    assert "LayerSettingEXT" in Path(header).read_text()


def test_no_amx_where_the_compiler_knows_it(machine, sdist, tmp_path, monkeypatch):
    def compiler(name, answer):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\ncase $1 in -mno-amx-tile) exit {answer};; esac\n")
        path.chmod(0o755)
        return str(path)

    flags = " -mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
    monkeypatch.setenv("CC", compiler("new", 0))
    for name, answer, wanted in (("also-new", 0, 2), ("old", 1, 0)):
        monkeypatch.setenv("CXX", compiler(name, answer))
        build.build("vulkan", sdist, into=tmp_path / "built" / name)
        configured = asked(machine).splitlines()[-3]
        assert configured.count(flags[1:]) == wanted
        assert "-DCMAKE_CXX_FLAGS=-include " in configured
    build.build("vulkan", sdist, into=tmp_path / "built" / "portable", portable=True)
    assert "-mno-amx" not in asked(machine).splitlines()[-3]


def test_the_package_of_cublas_where_the_toolkit_has_none(machine, sdist, tmp_path, monkeypatch):
    (machine / "toolkit" / "lib64" / "libcublas.so").unlink()
    site = tmp_path / "site" / "nvidia" / "cu13"
    for name in ("lib/libcublas.so.13", "lib/libcublasLt.so.13", "include/cublas_v2.h"):
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).touch()
    spec = type("Spec", (), {"submodule_search_locations": [str(site.parent)]})
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: spec)
    build.build("cuda", sdist)
    configured = asked(machine).splitlines()[0]
    assert f"-DCMAKE_CUDA_FLAGS=-I{site}/include" in configured and "-DCUDA_cublasLt_LIBRARY=" in configured
    assert f"/toolkit/lib64;{site}/lib" in configured
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(build.BuildError, match=r"has no cuBLAS: install it .*pip install nvidia-cublas"):
        build.build("cuda", sdist, into=tmp_path / "other")


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        (["nvcc"], r"install nvcc \(NVIDIA's CUDA toolkit"),
        (["cmake"], r"install cmake \(pip install cmake ninja\)"),
        (["c++"], r"install a C\+\+ compiler"),
        (["ninja"], r"install ninja"),
        (["nvcc", "c++"], r"install a C\+\+ compiler .*; nvcc"),
    ],
)
def test_what_is_missing_is_named(machine, sdist, gone, message):
    for name in gone:
        (machine / "bin" / name).unlink()
    with pytest.raises(build.BuildError, match=message):
        build.build("cuda", sdist)
    assert not (machine / "asked").exists()


def test_vulkan_without_glslc(machine, sdist):
    (machine / "bin" / "glslc").unlink()
    with pytest.raises(build.BuildError, match=r"to build ggml with vulkan, install glslc"):
        build.build("vulkan", sdist)


def test_nvcc_of_cuda_home(machine, sdist, tmp_path, monkeypatch):
    (tmp_path / "home" / "bin").mkdir(parents=True)
    (machine / "bin" / "nvcc").rename(tmp_path / "home" / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    build.build("cuda", sdist)
    assert f"CMAKE_CUDA_COMPILER={tmp_path}/home/bin/nvcc" in asked(machine)


def test_the_architecture(machine, sdist, tmp_path):
    build.build("cuda", sdist, architecture="7.5", into=tmp_path / "named")
    assert "CMAKE_CUDA_ARCHITECTURES=75 " in asked(machine)
    with pytest.raises(
        build.BuildError, match=r"compiles for the architectures 75, 90, 120, not for 61: take a CUDA toolkit"
    ):
        build.build("cuda", sdist, architecture="61")
    with pytest.raises(build.BuildError, match=r"must be a number such as 90 or 9\.0, got 'hopper'"):
        build.build("cuda", sdist, architecture="hopper")
    (machine / "cards").write_text("No devices were found\n")
    with pytest.raises(build.BuildError, match=r"nvidia-smi tells of no card here, so name .* --architecture 75 for"):
        build.build("cuda", sdist)


def test_too_little_room(machine, sdist, monkeypatch):
    monkeypatch.setattr(build.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 10**8}))
    with pytest.raises(build.BuildError, match=r"takes \d\.\d GB in .*, which has 0\.1: make room, or .* --into"):
        build.build("cuda", sdist)


def test_cmakes_own_words(machine, sdist, tmp_path, capsys):
    (machine / "broken").touch()
    assert build.main(["cuda", "--sdist", str(sdist)]) == 1
    printed = capsys.readouterr()
    log = tmp_path / "cache" / f"ggml-{build.VERSION}-cuda-90.log"
    assert (
        printed.out == ""
        and "could not build ggml: CMake Error at CMakeLists.txt:7 (message): no such header" in printed.err
    )
    assert str(log) in printed.err and "more" in log.read_text()
    assert [path.name for path in log.parent.iterdir()] == [log.name]  # nothing half made


def test_what_is_no_sdist(machine, tmp_path):
    other = make_sdist(tmp_path, "numpy-2.0/CMakeLists.txt")
    with pytest.raises(
        build.BuildError, match=rf"holds no libggml_python-{build.VERSION}/ggml/CMakeLists.txt: it must be"
    ):
        build.build("cuda", other)
    (tmp_path / "text").write_text("no archive")
    for path in (tmp_path / "text", tmp_path / "nothing"):
        with pytest.raises(build.BuildError, match=r"cannot be unpacked .*: it must be libggml_python-.* from PyPI"):
            build.build("cuda", path)


def test_a_place_that_holds_something(machine, sdist, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(build.BuildError, match="holds something else"):
        build.build("cuda", sdist, into=tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").exists()


def test_pip_that_fails(machine, monkeypatch):
    def run(command, **options):
        assert command[1:4] == ["-m", "pip", "download"] and build.SOURCES in command
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found\n")

    real = subprocess.run
    monkeypatch.setattr(build.subprocess, "run", lambda c, **o: run(c, **o) if "pip" in c else real(c, **o))
    with pytest.raises(
        build.BuildError, match=r"pip could not download .* \(No matching distribution found\): .* --sdist"
    ):
        build.build("cuda")


def test_one_cache_directory(monkeypatch):
    for settings in ({"TOY_CACHE": "/somewhere"}, {"XDG_CACHE_HOME": "/elsewhere"}, {}):
        for name in ("TOY_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        for platform in ("linux", "darwin", "win32"):
            monkeypatch.setattr(sys, "platform", platform)
            assert build.cache_directory() == cache_dir()


def test_the_command_runs_as_a_module():
    result = subprocess.run(
        [sys.executable, "-m", "ggml_bridge.build", "--help"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(toy.__file__).parent.parent)},
    )
    assert result.returncode == 0 and "TOY_GGML_DIR" in result.stdout and "--architecture" in result.stdout
