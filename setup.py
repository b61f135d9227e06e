"""Builds the Cython extensions. They are optional: without a C compiler the install succeeds in pure Python and says so.

Variables read at build time:

TOY_PURE_PYTHON=1   build no extension
TOY_REQUIRE_KERNELS=1   fail instead of falling back (what CI uses, so that a broken build is noticed)
TOY_MARCH=x86-64-v3   the value of -march (default `native`: an install from source runs where it was built;
                      set it when you build a wheel for other machines, or to an empty string for the compiler's default)
"""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PURE = os.environ.get("TOY_PURE_PYTHON", "") not in ("", "0")
REQUIRED = os.environ.get("TOY_REQUIRE_KERNELS", "") not in ("", "0")

# IEEE arithmetic stays (no -ffast-math: NaN must stay visible). -fopenmp-simd obeys the `omp simd` lines of simd_math.h and
# needs no OpenMP; the others let the compiler use fused multiply-adds and vectorise sqrt and conditional expressions.
FLAGS = ["-O3", "-g0", "-std=c11", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]

# macros that a compiler defines for -march, and how __builtin_cpu_supports calls the same feature
CPU_FEATURES = {
    "__SSE3__": "sse3", "__SSSE3__": "ssse3", "__SSE4_1__": "sse4.1", "__SSE4_2__": "sse4.2", "__POPCNT__": "popcnt",
    "__AVX__": "avx", "__AVX2__": "avx2", "__FMA__": "fma", "__BMI__": "bmi", "__BMI2__": "bmi2",
    "__AVX512F__": "avx512f", "__AVX512DQ__": "avx512dq", "__AVX512BW__": "avx512bw", "__AVX512VL__": "avx512vl",
    "__AVX512CD__": "avx512cd", "__AVX512VBMI__": "avx512vbmi", "__AVX512IFMA__": "avx512ifma",
    "__AVX512VNNI__": "avx512vnni",
}  # fmt: skip


def say(message):
    print(f"toy: {message}", file=sys.stderr)


def extensions():
    """One extension module for each toy/_kernels/*.pyx, or none (with a message) where they cannot be built."""
    if PURE:
        say("TOY_PURE_PYTHON is set: installing without compiled kernels")
        return []
    try:
        import Cython  # noqa: F401
        import numpy
        import scipy.linalg.cython_blas  # noqa: F401  its declarations are compiled in
    except ImportError as error:
        if REQUIRED:
            raise
        say(f"{error}: installing without compiled kernels")
        return []
    here = Path(__file__).parent
    modules = [
        Extension(
            f"toy._kernels.{source.stem}",
            [str(source.relative_to(here))],
            include_dirs=[numpy.get_include(), "toy/_kernels"],
            depends=[str(header.relative_to(here)) for header in (here / "toy" / "_kernels").glob("*.h")],
            define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
            extra_link_args=[] if sys.platform == "win32" else ["-pthread"],
        )
        for source in sorted((here / "toy" / "_kernels").glob("*.pyx"))
    ]
    return translate(modules, "the compiled kernels")


def translate(modules, what):
    """Cython to C; a Cython that cannot is a message unless the kernels are required."""
    from Cython.Build import cythonize
    from Cython.Compiler.Errors import CompileError

    try:
        return cythonize(modules, language_level=3) if modules else []
    except CompileError as error:
        if REQUIRED:
            raise
        say(f"Cython refused a source ({error}): installing without {what}")
        return []


def ggml_headers():
    """(include directory, version) of the ggml to compile against: TOY_GGML_DIR or the libggml package; None without."""
    places = []
    if os.environ.get("TOY_GGML_DIR"):
        places = [Path(os.environ["TOY_GGML_DIR"])]
        places += [places[0].parent]  # the variable may name the lib directory of an installation
    elif (spec := importlib.util.find_spec("libggml")) is not None:
        places = [Path(place) for place in spec.submodule_search_locations]
    for place in places:
        if (place / "include" / "ggml.h").exists():
            for config in place.glob("lib*/cmake/ggml/ggml-*version.cmake"):
                if found := re.search(r'set\(PACKAGE_VERSION "([\d.]+)"\)', config.read_text()):
                    return place / "include", found[1]
            say(f"{place} does not say which version of ggml it is (no lib*/cmake/ggml)")
    return None


def bridge_extensions():
    """ggml_bridge.core needs ggml's headers and is not linked with ggml: the libraries are opened at run time."""
    headers = None if PURE else ggml_headers()
    if headers is None:
        if not PURE:
            say(
                "no ggml headers, so no ggml_bridge; for it: pip install 'libggml-python>=0.20.2,<0.21' and install again"
            )
        return []
    if importlib.util.find_spec("Cython") is None:
        return []  # extensions() has said so
    include, version = headers
    core = Extension(
        "ggml_bridge.core",
        ["ggml_bridge/core.pyx"],
        include_dirs=[str(include), "ggml_bridge"],
        depends=["ggml_bridge/graph.pxi", "ggml_bridge/planner.pxi", "ggml_bridge/functions.h"],
        define_macros=[("GGML_BRIDGE_HEADERS_VERSION", f'"{version}"')],
        extra_compile_args=["/O2", "/std:c11"] if sys.platform == "win32" else ["-O2", "-std=gnu11"],
    )
    # the project's kernels as nodes of a graph: compiled with their flags (build_extensions)
    kernels = Extension(
        "ggml_bridge.kernels",
        ["ggml_bridge/kernels.pyx"],
        include_dirs=[str(include), "ggml_bridge", "toy/_kernels"],
    )
    modules = translate([core, kernels], "ggml_bridge")
    for module in modules:  # cythonize would have dropped it
        module.optional = not REQUIRED  # a failure is a warning, and leaves the other extensions alone
    return modules


class OptionalBuild(build_ext):
    """Compile the kernels, or say why not: a missing compiler is a message, not the end of the install."""

    def run(self):
        try:
            super().run()
        except Exception as error:
            if REQUIRED:
                raise
            say(f"the compiled kernels were not built ({type(error).__name__}: {error})")
            say(
                "continuing in pure Python: backend 'numpy' works; install a C compiler and reinstall for backend 'cython'"
            )
            # some of the kernels without the others are of no use
            for extension in self.extensions:
                if extension.name.startswith("toy._kernels."):
                    Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            self.extensions = [e for e in self.extensions if Path(self.get_ext_fullpath(e.name)).exists()]

    def build_extensions(self):
        if self.parallel is None:
            self.parallel = os.cpu_count()
        flags = ["/O2", "/std:c11"]
        features = ""
        if self.compiler.compiler_type != "msvc":
            march = os.environ.get("TOY_MARCH", "native")
            flags = FLAGS
            if march and self._preprocess([*FLAGS, f"-march={march}"]) is not None:
                flags = [*FLAGS, f"-march={march}"]
            elif march and self._preprocess(FLAGS) is not None:
                say(f"this compiler does not take -march={march}: compiling for its default CPU")
            macros = (self._preprocess(flags) or "").split()
            baseline = (self._preprocess(FLAGS) or "").split()
            features = " ".join(
                name for macro, name in CPU_FEATURES.items() if macro in macros and macro not in baseline
            )
        for extension in self.extensions:
            if extension.name.startswith("toy._kernels.") or extension.name == "ggml_bridge.kernels":
                extension.extra_compile_args = flags
            if extension.name == "toy._kernels.cpu":
                # compiled for any CPU of the family: it tells at import time whether this one can run the others
                extension.extra_compile_args = [flag for flag in flags if not flag.startswith("-march")]
                if self.compiler.compiler_type != "msvc":
                    extension.define_macros += [
                        ("TOY_TARGET_FEATURES", f'"{features}"'),
                        ("TOY_COMPILE_FLAGS", f'"{" ".join(flags)}"'),
                    ]
        super().build_extensions()

    def _preprocess(self, flags):
        """The macros that the compiler defines under these flags, or None if it refuses them."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "empty.c")
            source.write_text("")
            command = [*self.compiler.compiler_so, *flags, "-dM", "-E", str(source)]
            try:
                result = subprocess.run(command, capture_output=True, text=True)
            except OSError:
                return None
            return result.stdout if result.returncode == 0 else None


setup(ext_modules=extensions() + bridge_extensions(), cmdclass={"build_ext": OptionalBuild})
