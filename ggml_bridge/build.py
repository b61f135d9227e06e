"""`python -m ggml_bridge.build cuda`: a ggml with a GPU backend, compiled here from the sdist of libggml-python.

The wheels of libggml-python for Linux and Windows have the CPU only. This unpacks the sdist (pip fetches it, or `--sdist`
names the file: then nothing is fetched), lets cmake compile ggml with one more backend, and prints the directory as
`TOY_GGML_DIR=...`, alone on stdout. What was built once is kept in the cache directory and only printed the next time.

CUDA is built for one architecture, that of the card here unless another is named. Left out of it: the templates of flash
attention (no training graph uses them, and they are most of the compile time), NCCL, and virtual memory management, whose
link with the driver's library would keep the build from loading on a machine without a driver. CUDA graphs, which ggml
leaves out by default, are in: a step is a few thousand short kernels, which one launch then starts.
"""

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from ggml_bridge.loading import SOURCES

BACKENDS = ("cuda", "vulkan")
NAME, _, VERSION = SOURCES.partition("==")
ROOM = {"cuda": 0.5e9, "vulkan": 0.5e9}  # bytes that building takes, sources and result included, rounded up
ARCHITECTURES = "75 for RTX 20, 80 for A100, 86 for RTX 30, 89 for RTX 40, 90 for H100, 120 for RTX 50"

COMMON = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    "GGML_BUILD_TESTS": "OFF",
    "GGML_BUILD_EXAMPLES": "OFF",
    "GGML_CCACHE": "OFF",
    "GGML_OPENMP": "OFF",  # as in the wheels: threads come from the pool that the bridge attaches
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
}
CUDA = {
    "GGML_CUDA": "ON",
    "GGML_CUDA_GRAPHS": "ON",
    "GGML_CUDA_FA": "OFF",
    "GGML_CUDA_NO_VMM": "ON",
    "GGML_CUDA_NCCL": "OFF",
}


class BuildError(RuntimeError):
    """ggml cannot be built here; the message says what is missing, or where cmake's own words are."""


class CuBLAS(NamedTuple):
    """Where cuBLAS is when it is not in the CUDA toolkit: as a package of Python, which PyTorch brings too."""

    libraries: Path  # libcublas.so.13, libcublasLt.so.13
    include: Path


def build(
    backend: str,
    sdist: str | os.PathLike[str] | None = None,
    architecture: str | None = None,
    into: str | os.PathLike[str] | None = None,
    portable: bool = False,
    jobs: int | None = None,
) -> Path:
    """Build ggml with a backend of BACKENDS -> its directory, for TOY_GGML_DIR.

    sdist: the file libggml_python-VERSION.tar.gz; None: pip downloads it. architecture: of CUDA, "90" or "9.0"; None: that
    of the card, as nvidia-smi tells it. into: a directory that is made; None: one in the cache directory, where a
    finished build is used again. portable: for other processors than this one (AVX2). jobs: compilers at a time.

    Raises BuildError.
    """
    if backend not in BACKENDS:
        raise BuildError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    settings = COMMON | {"GGML_NATIVE": "OFF" if portable else "ON"}
    label, libraries = f"ggml-{VERSION}-{backend}", []
    tools = _tools(backend)
    if backend == "cuda":
        number = _architecture(architecture, tools["nvcc"])
        label += f"-{number}"
        settings |= CUDA | {"CMAKE_CUDA_ARCHITECTURES": number, "CMAKE_CUDA_COMPILER": tools["nvcc"]}
        libraries = [toolkit_libraries(tools["nvcc"])]
    else:
        settings |= {"GGML_VULKAN": "ON", "CMAKE_CXX_FLAGS": f"-include {Path(__file__).with_name(_LAYER_SETTINGS)}"}
    place = Path(into) if into is not None else cache_directory() / (label + ("-portable" if portable else ""))
    if (place / "include" / "ggml.h").exists():  # put there whole, as the last thing
        return place
    if place.exists() and any(place.iterdir()):
        raise BuildError(f"{place} is there and holds something else: name a directory that is empty or not there")
    place.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place.parent).free
    if free < ROOM[backend]:
        raise BuildError(
            f"building ggml with {backend} takes {ROOM[backend] / 1e9:.1f} GB in {place.parent}, which has {free / 1e9:.1f}: "
            "make room, or name another place with --into"
        )
    with tempfile.TemporaryDirectory(prefix="building-", dir=place.parent) as folder:
        work = Path(folder)
        sources = _unpack(Path(sdist) if sdist is not None else _download(work), work)
        if backend == "cuda" and (cublas := _cublas(tools["nvcc"])) is not None:
            settings |= _link_cublas(cublas, work)
            libraries.append(cublas.libraries)
        if not portable and (flags := _without_amx()):
            for name in ("CMAKE_C_FLAGS", "CMAKE_CXX_FLAGS"):
                settings[name] = f"{settings.get(name, '')} {flags}".strip()
        settings["CMAKE_INSTALL_RPATH"] = ";".join(["$ORIGIN", *map(str, libraries)])
        _compile(tools, sources, work, settings, place.parent / f"{label}.log", jobs)
        if place.exists():
            place.rmdir()
        os.replace(work / "installed", place)
    return place


_LAYER_SETTINGS = "vulkan_layer_settings.h"


def cache_directory() -> Path:
    """Where builds are kept: TOY_CACHE, or `toy` in the platform's cache directory (as `toy.files.fetch.cache_dir`)."""
    if chosen := os.environ.get("TOY_CACHE"):
        return Path(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "toy" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "toy"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "toy"


# ----------------------------------------------------------------------------------------------------------------------
# what the machine has
# ----------------------------------------------------------------------------------------------------------------------


def _without_amx() -> str:
    """The compiler's options that leave out AMX, where it knows them. Compiled for a processor with AMX by GCC 12, ggml ends
    the process with an illegal instruction as soon as two rows meet Q8_0 weights."""
    options = ["-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16"]
    compilers = (os.environ.get("CC", "cc"), os.environ.get("CXX", "c++"))
    known = [_output([*shlex.split(name), *options, "-x", "c", "-fsyntax-only", os.devnull]) for name in compilers]
    return "" if None in known else " ".join(options)


def _tools(backend: str) -> dict[str, str]:
    """{name: path} of the programs that a build needs. Raises BuildError that names all that are missing."""
    places = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])  # a cmake from pip, too
    found = {name: shutil.which(name, path=places) for name in ("cmake", "ninja")}
    missing = [] if found["cmake"] else ["cmake (pip install cmake ninja)"]
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl") if name):
        missing.append("a C++ compiler (on Debian: apt install g++)")
    if not found["ninja"] and not shutil.which("make") and sys.platform != "win32":
        missing.append("ninja (pip install ninja)")
    if backend == "cuda":
        found["nvcc"] = _nvcc()
        if found["nvcc"] is None:
            missing.append("nvcc (NVIDIA's CUDA toolkit; in PATH, or CUDA_HOME names its directory)")
    elif shutil.which("glslc") is None:
        missing.append("glslc (on Debian: apt install libvulkan-dev glslc spirv-headers)")
    if missing:
        raise BuildError(f"to build ggml with {backend}, install {'; '.join(missing)}")
    return {name: path for name, path in found.items() if path is not None}


def _nvcc() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for home in homes:
        if path := shutil.which("nvcc", path=str(Path(home) / "bin")):
            return path
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def _architecture(wanted: str | None, nvcc: str) -> str:
    """The architecture to compile for, as cmake takes it ("90"). Raises BuildError for one that nvcc does not know."""
    if wanted is None:
        wanted = _of_the_card()
        if wanted is None:
            raise BuildError(
                f"nvidia-smi tells of no card here, so name the architecture to compile for: --architecture {ARCHITECTURES}"
            )
    match = re.fullmatch(r"(\d+)\.(\d)|(\d{2,3})", wanted.strip())
    if match is None:
        raise BuildError(f"the architecture must be a number such as 90 or 9.0, got {wanted!r} ({ARCHITECTURES})")
    number = match[3] or match[1] + match[2]
    listed = _output([nvcc, "--list-gpu-arch"]) or ""
    known = sorted({int(text) for text in re.findall(r"compute_(\d+)\b", listed)})
    if known and int(number) not in known:
        raise BuildError(
            f"{nvcc} compiles for the architectures {', '.join(map(str, known))}, not for {number}: "
            "take a CUDA toolkit that does (toolkit 12 is the last for cards before RTX 20)"
        )
    return number


def _of_the_card() -> str | None:
    """The compute capability of the oldest card, "8.6": code for it runs on newer ones too. None: nvidia-smi tells none."""
    text = _output(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]) or ""
    found = re.findall(r"^\s*(\d+)\.(\d)\s*$", text, re.M)
    return ".".join(map(str, min((int(major), int(minor)) for major, minor in found))) if found else None


def toolkit_libraries(nvcc: str) -> Path:
    """The directory of the CUDA toolkit's libraries, from what nvcc says of itself."""
    said = _output([nvcc, "--dryrun", "-c", "x.cu"], errors=True) or ""
    top = re.search(r"^#\$ TOP=(.+)$", said, re.M)
    root = Path(top[1]) if top else Path(nvcc).resolve().parent.parent
    return next((root / name for name in ("lib64", "lib") if (root / name).is_dir()), root).resolve()


def _cublas(nvcc: str) -> CuBLAS | None:
    """None where the toolkit has cuBLAS; else the package nvidia-cublas. Raises BuildError when there is neither."""
    libraries = toolkit_libraries(nvcc)
    if any(libraries.glob("libcublas.so")) or sys.platform == "win32":
        return None
    # packages of one namespace: nvidia/cu13/lib since CUDA 13, nvidia/cublas/lib before
    spec = importlib.util.find_spec("nvidia")
    for root in map(Path, spec.submodule_search_locations or [] if spec is not None else []):
        for folder in (*sorted(root.glob("cu[0-9]*"), reverse=True), root / "cublas"):
            if any((folder / "lib").glob("libcublas.so.*")) and (folder / "include" / "cublas_v2.h").exists():
                return CuBLAS(folder / "lib", folder / "include")
    raise BuildError(
        f"the CUDA toolkit in {libraries.parent} has no cuBLAS: install it (on Debian: libcublas-dev-*), or its package for "
        "this Python (pip install nvidia-cublas; nvidia-cublas-cu12 for toolkit 12)"
    )


def _link_cublas(cublas: CuBLAS, work: Path) -> dict[str, str]:
    """cmake's settings for a cuBLAS outside the toolkit, whose libraries carry a version at the end of their names."""
    links = work / "cublas"
    links.mkdir()
    settings = {}
    for name in ("cublas", "cublasLt"):
        (links / f"lib{name}.so").symlink_to(next(iter(sorted(cublas.libraries.glob(f"lib{name}.so.*")))))
        settings[f"CUDA_{name}_LIBRARY"] = str(links / f"lib{name}.so")
    return settings | dict.fromkeys(("CMAKE_CUDA_FLAGS", "CMAKE_CXX_FLAGS"), f"-I{cublas.include}")


def _output(command: Sequence[str], errors: bool = False) -> str | None:
    """What a program prints, None where it is not there or fails. errors: what it prints on stderr."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if result.returncode:
        return None
    return result.stderr if errors else result.stdout


# ----------------------------------------------------------------------------------------------------------------------
# building
# ----------------------------------------------------------------------------------------------------------------------


def _download(folder: Path) -> Path:
    """Let pip download the sdist, with the index, mirror and proxy that the user gave it."""
    _say(f"downloading the sources of {SOURCES}")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-binary",
        NAME,
        "--dest",
        str(folder),
        SOURCES,
    ]
    result = subprocess.run(
        [*command, "-q", "--disable-pip-version-check"], capture_output=True, text=True, errors="replace"
    )
    found = sorted(folder.glob("libggml*.tar.gz"))
    if result.returncode or not found:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["no reason given"]
        raise BuildError(
            f"pip could not download {SOURCES} ({errors[-1].removeprefix('ERROR: ')}): check the network, or fetch the file "
            f"{_sdist_name()} from PyPI elsewhere and name it with --sdist"
        )
    return found[0]


def _sdist_name() -> str:
    return f"{NAME.replace('-', '_')}-{VERSION}.tar.gz"


def _unpack(sdist: Path, work: Path) -> Path:
    """The directory of ggml's sources, out of the sdist."""
    expected = f"{_sdist_name().removesuffix('.tar.gz')}/ggml"
    try:
        with tarfile.open(sdist) as archive:
            if hasattr(tarfile, "data_filter"):
                archive.extraction_filter = tarfile.data_filter
            archive.extractall(work)
    except (OSError, tarfile.TarError) as error:
        why = str(error).splitlines()[0].rstrip(":")
        raise BuildError(f"{sdist} cannot be unpacked ({why}): it must be {_sdist_name()} from PyPI") from error
    if not (work / expected / "CMakeLists.txt").exists():
        raise BuildError(f"{sdist} holds no {expected}/CMakeLists.txt: it must be {_sdist_name()} from PyPI")
    return work / expected


def _compile(
    tools: Mapping[str, str],
    sources: Path,
    work: Path,
    settings: Mapping[str, str],
    log: Path,
    jobs: int | None,
) -> None:
    """cmake: configure, build, install into work/installed. log: where its words go; it is deleted when all went well."""
    jobs = jobs or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    cmake, made = tools["cmake"], str(work / "build")
    defines = [f"-D{name}={value}" for name, value in settings.items()]
    if "ninja" in tools:
        defines += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}"]
    started = time.monotonic()
    with open(log, "w", encoding="utf-8", newline="\n") as file:
        for step in (
            [cmake, "-S", str(sources), "-B", made, f"-DCMAKE_INSTALL_PREFIX={work / 'installed'}", *defines],
            [cmake, "--build", made, "--config", "Release", "--parallel", str(jobs)],
            [cmake, "--install", made, "--config", "Release"],
        ):
            _run_step(step, file, log)
    log.unlink()
    _say(f"built in {time.monotonic() - started:.0f} s")


def _run_step(command: Sequence[str], file: TextIO, log: Path) -> None:
    """Run a step, its words into the log, how far it is (ninja's [12/154], make's [ 8%]) on stderr now and then."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    said, shown = [], 0.0
    try:
        for line in process.stdout or ():
            file.write(line)
            said.append(line.strip())
            progress = re.match(r"\[\s*(\d+/\d+|\d+%)\]", line)
            if progress and time.monotonic() > shown + 30:
                _say(f"compiling: {progress[1]}")
                shown = time.monotonic()
        process.wait()
    finally:  # Ctrl-C
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
    if process.returncode:
        complaints = [line for line in said if re.search(r"\berror\b|CMake Error|not found|Could NOT find", line, re.I)]
        first = (complaints or said or ["it said nothing"])[0]
        raise BuildError(f"cmake could not build ggml: {first} (all that it said is in {log})")


def _say(text: str) -> None:
    print(f"ggml_bridge.build: {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: prints TOY_GGML_DIR=... on stdout; what went wrong in one sentence on stderr, with exit code 1."""
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m ggml_bridge.build",
        description=summary,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("backend", choices=BACKENDS)
    parser.add_argument("--sdist", metavar="FILE", help=f"{_sdist_name()}; without it pip downloads it")
    parser.add_argument("--architecture", metavar="N", help=f"of CUDA, else that of the card here: {ARCHITECTURES}")
    parser.add_argument("--into", metavar="DIR", help="directory of the build, else one in the cache directory")
    parser.add_argument("--portable", action="store_true", help="for other processors too, not for this very one")
    parser.add_argument("--jobs", type=int, metavar="N", help="compilers at a time, else one for each processor")
    asked = parser.parse_args(arguments)
    try:
        place = build(asked.backend, asked.sdist, asked.architecture, asked.into, asked.portable, asked.jobs)
    except (BuildError, OSError) as error:
        _say(str(error))
        return 1
    print(f"TOY_GGML_DIR={place.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
