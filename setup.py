"""Builds the Cython extensions. They are optional: without a C compiler the install succeeds in pure Python and says so.

Variables read at build time:

TOY_PURE_PYTHON=1   build no extension
TOY_REQUIRE_KERNELS=1   fail instead of falling back (what CI uses, so that a broken build is noticed)
TOY_MARCH=x86-64-v3   the value of -march (default `native`: an install from source runs where it was built;
                      set it when you build a wheel for other machines, or to an empty string for the compiler's default)
TOY_GGML_DIR=DIR    compile ggml_bridge with the headers of this ggml instead of the package libggml's
TOY_REPOSITORY_URL=URL   where the sources are published: README's links and the package's addresses lead there
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
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
PURE = os.environ.get("TOY_PURE_PYTHON", "") not in ("", "0")
REQUIRED = os.environ.get("TOY_REQUIRE_KERNELS", "") not in ("", "0")

# What stands or falls together: some of the kernels without the others are of no use, nor is half a bridge.
PARTS = {"toy._kernels": "the compiled kernels", "ggml_bridge": "ggml_bridge"}
KERNELS_OF_THE_BRIDGE = "ggml_bridge.kernels"  # calls into toy._kernels: of no use without that part either

# IEEE arithmetic stays (no -ffast-math: NaN must stay visible). -fopenmp-simd obeys the `omp simd` lines of simd_math.h and
# needs no OpenMP; the others let the compiler use fused multiply-adds and vectorise sqrt and conditional expressions.
FLAGS = ["-O3", "-g0", "-std=c11", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]

# Microsoft's compiler has no -march and tells little by macros: its option, and what it may use then (named as in cpu.h).
MSVC_AVX2 = "avx avx2 fma f16c bmi bmi2 lzcnt movbe popcnt sse3 ssse3 sse4_1 sse4_2"
MSVC_ARCHITECTURES = {
    "x86-64-v3": ("/arch:AVX2", MSVC_AVX2),
    "x86-64-v4": ("/arch:AVX512", f"{MSVC_AVX2} avx512f avx512cd avx512bw avx512dq avx512vl"),
}
PF_AVX2_INSTRUCTIONS_AVAILABLE = 40  # an argument of Windows' IsProcessorFeaturePresent


def say(message):
    print(f"toy: {message}", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# what there is to build
# ----------------------------------------------------------------------------------------------------------------------


def extensions():
    """One extension module for each .pyx, none in pure Python; `OptionalBuild` sees whether they can be built."""
    if PURE:
        say("TOY_PURE_PYTHON is set: installing without compiled kernels")
        return []
    headers = [str(header.relative_to(HERE)) for header in (HERE / "toy" / "_kernels").glob("*.h")]
    kernels = [
        Extension(
            f"toy._kernels.{source.stem}",
            [str(source.relative_to(HERE))],
            include_dirs=["toy/_kernels"],
            depends=headers,
            define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
            extra_link_args=[] if sys.platform == "win32" else ["-pthread"],
        )
        for source in sorted((HERE / "toy" / "_kernels").glob("*.pyx"))
    ]
    core = Extension(
        "ggml_bridge.core",
        ["ggml_bridge/core.pyx"],
        include_dirs=["ggml_bridge"],
        depends=["ggml_bridge/graph.pxi", "ggml_bridge/planner.pxi", "ggml_bridge/functions.h"],
        extra_compile_args=["/O2", "/std:c11"] if sys.platform == "win32" else ["-O2", "-std=gnu11"],
    )
    # the project's kernels as nodes of a graph: compiled with their flags (build_extensions)
    nodes = Extension(KERNELS_OF_THE_BRIDGE, ["ggml_bridge/kernels.pyx"], include_dirs=["ggml_bridge", "toy/_kernels"])
    return [*kernels, core, nodes]


def part_of(extension):
    """toy._kernels.linear -> toy._kernels"""
    return extension.name.rpartition(".")[0]


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


# ----------------------------------------------------------------------------------------------------------------------
# for which CPU
# ----------------------------------------------------------------------------------------------------------------------


def cpu_features(macros, baseline):
    """The instruction sets, named as in cpu.h, that a compiler's macros have and its default's do not.

    macros, baseline: the text of `-dM -E`. Each instruction set is a macro that is 1: __AVX512F__ -> avx512f,
    __ARM_FEATURE_SVE -> sve. So a set that no list knows yet is recorded too.
    """
    new = set(macros.splitlines()) - set(baseline.splitlines())
    found = set()
    for line in new:
        macro = re.fullmatch(r"#define __(?!FLT|DBL|LDBL|FP_FAST)(?:ARM_FEATURE_)?([A-Z][A-Z0-9_]*?)(?:__)? 1", line)
        if macro and not macro[1].startswith("GCC_"):
            found.add(macro[1].lower())
    return sorted(found)


def msvc_architecture(march):
    """(flags, features) for a value of TOY_MARCH under Microsoft's compiler, where `native` asks Windows for AVX2."""
    if march == "native":
        import ctypes

        has_avx2 = ctypes.windll.kernel32.IsProcessorFeaturePresent(PF_AVX2_INSTRUCTIONS_AVAILABLE)
        march = "x86-64-v3" if has_avx2 else ""
    if march in MSVC_ARCHITECTURES:
        flag, features = MSVC_ARCHITECTURES[march]
        return [flag], features.split()
    if march not in ("", "x86-64", "x86-64-v2"):
        say(
            f"Microsoft's compiler knows no TOY_MARCH={march} (only {', '.join(MSVC_ARCHITECTURES)}): using its default CPU"
        )
    return [], []


# ----------------------------------------------------------------------------------------------------------------------
# building it, or saying why not
# ----------------------------------------------------------------------------------------------------------------------


def remove_extensions(folder, names, suffix):
    """Delete the extension modules `names` (toy._kernels.* is all of that package) of this Python under `folder`."""
    for name in names:
        package, _, module = name.rpartition(".")
        for path in Path(folder, *package.split(".")).glob(f"{module}{suffix}"):
            try:
                path.unlink()
            except OSError as error:
                say(f"cannot delete the old {path} ({error.strerror}): delete it yourself, or it will be used")


class OptionalBuild(build_ext):
    """Compile the extensions, or say why not: a missing compiler is a message, not the end of the install.

    Of a part (see PARTS) that could not be built nothing is left, of an earlier build neither: not in the folder that
    becomes the wheel, and not beside the sources where they are built in place.
    """

    def run(self):
        self.failed = {}  # part -> why
        self.in_place = self.inplace  # the original's run() changes it on the way
        self._prepare()
        try:
            super().run()
        except Exception as error:
            if REQUIRED:
                raise
            self.inplace = self.in_place
            for part in PARTS:
                self._fail(part, error)
        self._leave_out_failed()
        if PURE:
            self._remove([f"{part}.*" for part in PARTS])
        for part, why in self.failed.items():
            say(f"{PARTS[part]}: not built, {why}")
        if "toy._kernels" in self.failed:
            say("continuing in pure Python: backend 'numpy' works; install a C compiler and reinstall for 'cython'")

    def _prepare(self):
        """Translate Cython to C, and find what is to be compiled against."""
        if not self.extensions:
            return
        headers = ggml_headers()
        if headers is None:
            self.failed["ggml_bridge"] = (
                "there are no ggml headers (no wheel of libggml-python for this Python; TOY_GGML_DIR names a ggml you have)"
            )
        try:
            import numpy
            import scipy.linalg.cython_blas  # noqa: F401  its declarations are compiled in
            from Cython.Build import cythonize
            from Cython.Compiler.Errors import CompileError
        except ImportError as error:
            if REQUIRED:
                raise
            for part in PARTS:
                self._fail(part, error)
            return
        for extension in self.extensions:
            if part_of(extension) == "toy._kernels":
                extension.include_dirs.append(numpy.get_include())
            elif headers is not None:
                extension.include_dirs.append(str(headers[0]))
                extension.define_macros.append(("GGML_BRIDGE_HEADERS_VERSION", f'"{headers[1]}"'))
        for part in PARTS.keys() - self.failed.keys():
            of_part = {extension.name: extension for extension in self.extensions if part_of(extension) == part}
            try:
                for translated in cythonize(list(of_part.values()), language_level=3):
                    extension = of_part[translated.name]
                    extension.sources, extension.depends = translated.sources, translated.depends
            except CompileError as error:
                if REQUIRED:
                    raise
                self._fail(part, error)

    def build_extensions(self):
        self._leave_out_failed()
        if self.parallel is None:
            self.parallel = os.cpu_count()
        flags, features = self._flags_and_features()
        for extension in self.extensions:
            if part_of(extension) == "toy._kernels" or extension.name == KERNELS_OF_THE_BRIDGE:
                extension.extra_compile_args = flags
            if extension.name == "toy._kernels.cpu":
                # compiled for any CPU of the family: it tells at import time whether this one can run the others
                extension.extra_compile_args = [flag for flag in flags if not flag.startswith(("-march", "/arch"))]
                extension.define_macros += [
                    ("TOY_TARGET_FEATURES", f'"{" ".join(features)}"'),
                    ("TOY_COMPILE_FLAGS", f'"{" ".join(flags)}"'),
                ]
        super().build_extensions()
        self._leave_out_failed()

    def build_extension(self, extension):
        try:
            super().build_extension(extension)
        except Exception as error:
            if REQUIRED:
                raise
            self._fail(part_of(extension), error)

    def _fail(self, part, error):
        self.failed.setdefault(part, f"{type(error).__name__}: {error}".splitlines()[0])

    def _leave_out_failed(self):
        """Take the failed parts out of what is to be built and installed, and delete what there is of them."""
        useless = [f"{part}.*" for part in self.failed]
        if "toy._kernels" in self.failed:
            useless.append(KERNELS_OF_THE_BRIDGE)
        self.extensions = [
            extension
            for extension in self.extensions
            if part_of(extension) not in self.failed and extension.name not in useless
        ]
        self._remove(useless)

    def _remove(self, names):
        suffix = self.get_ext_filename("")
        for folder in [self.build_lib, *([HERE] if self.in_place else [])]:
            remove_extensions(folder, names, suffix)

    def _flags_and_features(self):
        """The flags for the kernels, and the instruction sets that they allow beyond the compiler's default."""
        march = os.environ.get("TOY_MARCH", "native")
        if self.compiler.compiler_type == "msvc":
            flags, features = msvc_architecture(march)
            return ["/O2", "/std:c11", *flags], features
        if march and self.compiler.compiler_so.count("-arch") > 1:
            say(
                f"this Python builds for several architectures at once: leaving out -march={march} (set ARCHFLAGS for one)"
            )
            march = ""
        flags = FLAGS
        if march and self._preprocess([*FLAGS, f"-march={march}"]) is not None:
            flags = [*FLAGS, f"-march={march}"]
        elif march and self._preprocess(FLAGS) is not None:
            say(f"this compiler does not take -march={march}: compiling for its default CPU")
        return flags, cpu_features(self._preprocess(flags) or "", self._preprocess(FLAGS) or "")

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


class PurePython(build_py):
    """Without extensions setuptools never asks `OptionalBuild`: those of an earlier install in place are deleted here."""

    def run(self):
        super().run()
        if PURE and self.editable_mode:
            remove_extensions(
                HERE, [f"{part}.*" for part in PARTS], self.get_finalized_command("build_ext").get_ext_filename("")
            )


# ----------------------------------------------------------------------------------------------------------------------
# what the package says of itself
# ----------------------------------------------------------------------------------------------------------------------


def version():
    return re.search(r'^VERSION = "([^"]+)"', (HERE / "toy" / "config.py").read_text(encoding="utf-8"), re.M)[1]


def repository_url():
    """TOY_REPOSITORY_URL; in an sdist the address it was made with; an empty string where neither is there."""
    if os.environ.get("TOY_REPOSITORY_URL"):
        return os.environ["TOY_REPOSITORY_URL"].rstrip("/")
    record = HERE / "PKG-INFO"
    found = (
        re.search(r"^Project-URL: Source, (\S+)$", record.read_text(encoding="utf-8"), re.M)
        if record.exists()
        else None
    )
    return found[1] if found else ""


def project_urls(repository):
    if not repository:
        return {}
    return {
        "Source": repository,
        "Issues": f"{repository}/issues",
        "Changelog": f"{repository}/blob/v{version()}/CHANGELOG.md",
    }


def long_description(repository):
    """README.md; its links to files of the repository, which lead nowhere on a package index, lead to the published ones, and
    its pictures are loaded from there."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    if not repository:
        return text
    text = re.sub(r"(!\[[^\]]*)\]\((?![a-z]+:)([^)\s]+)\)", rf"\1]({repository}/raw/v{version()}/\2)", text)
    return re.sub(r"\]\((?![a-z]+:|#)([^)\s]+)\)", rf"]({repository}/blob/v{version()}/\1)", text)


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": OptionalBuild, "build_py": PurePython},
    long_description=long_description(repository_url()),
    long_description_content_type="text/markdown",
    project_urls=project_urls(repository_url()),
)
