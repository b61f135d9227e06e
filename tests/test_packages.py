"""The packages: what an sdist and a wheel hold and say of themselves, what a failed build leaves behind, for which CPU.

Nothing here asks a network. The builds are of a small project with this setup.py, so that each takes a second; .ci/run builds
and installs the real one.
"""

import email
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import types
import zipfile
from pathlib import Path

import pytest

import toy
from ggml_bridge import loading

ROOT = Path(__file__).parent.parent
if not (ROOT / "setup.py").exists():
    pytest.skip("the sources of the package are not beside these tests", allow_module_level=True)
BUILDING = "building needs it: pip install setuptools cython packaging"
setuptools, requirements, tags, versions, _ = (
    pytest.importorskip(module, reason=BUILDING)
    for module in ("setuptools", "packaging.requirements", "packaging.tags", "packaging.version", "Cython")
)
if versions.Version(setuptools.__version__) < versions.Version("77.0.1"):
    pytest.skip("building needs setuptools 77.0.1 or newer", allow_module_level=True)
tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")

Requirement = requirements.Requirement
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
REPOSITORY = "https://example.org/somebody/toy"
BUILT = {".c", ".cpp", ".html", ".so", ".pyd", ".pyc"}


def run(*command, cwd, check=True, **environment):
    """Runs a command without the build variables of this process -> CompletedProcess, its output as text."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TOY_")}
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=clean | {name: str(value) for name, value in environment.items()},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 or not check, result.stdout[-2000:] + result.stderr[-2000:]
    return result


@pytest.fixture(scope="module")
def setup_py():
    """The functions of setup.py."""
    real, setuptools.setup = setuptools.setup, lambda **keywords: None
    try:
        return runpy.run_path(str(ROOT / "setup.py"))
    finally:
        setuptools.setup = real


# ----------------------------------------------------------------------------------------------------------------------
# what is in them
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of the sources in which somebody has built and tested before."""
    folder = tmp_path_factory.mktemp("sources") / "toy"
    unwanted = shutil.ignore_patterns(
        "*.c", "*.so", "*.pyd", "__pycache__", "*.egg-info", ".git", "runs", "build", "dist"
    )
    for part in ("toy", "ggml_bridge", "tests", "examples", "benchmarks"):
        shutil.copytree(ROOT / part, folder / part, ignore=unwanted)
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy2(path, folder)
    for decoy in (
        "toy/_kernels/linear.c",
        f"toy/_kernels/linear{SUFFIX}",
        "ggml_bridge/core.c",
        "tests/__pycache__/a.pyc",
        "tests/a.so",
    ):
        (folder / decoy).parent.mkdir(exist_ok=True)
        (folder / decoy).write_bytes(b"of an earlier build")
    return folder


@pytest.fixture(scope="module")
def sdist(sources, tmp_path_factory):
    dist = tmp_path_factory.mktemp("sdist")
    run("setup.py", "-q", "sdist", "-d", dist, cwd=sources, TOY_REPOSITORY_URL=REPOSITORY + "/")
    (path,) = dist.iterdir()
    return path


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(unpacked, tmp_path_factory):
    """A pure wheel, built from the sdist as pip would build it."""
    dist = tmp_path_factory.mktemp("wheel")
    run("setup.py", "-q", "bdist_wheel", "-d", dist, cwd=unpacked, TOY_PURE_PYTHON=1)
    (path,) = dist.iterdir()
    return path


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_sdist_holds_the_sources_and_their_tests(sdist, unpacked, sources):
    names = files_below(unpacked)
    wanted = {
        name
        for name in files_below(sources)
        if name.split("/")[0] in ("toy", "ggml_bridge", "tests", "examples", "benchmarks")
        and Path(name).suffix not in BUILT
        and "egg-info" not in name
    } - {"tests/test_notebooks.py", "tests/test_site.py"}
    assert {"tests/conftest.py", "toy/_kernels/cpu.h", "ggml_bridge/graph.pxi"} <= wanted
    assert wanted <= names
    assert {"setup.py", "build_backend.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= names
    assert {name for name in names if Path(name).suffix in BUILT} == set()
    assert sdist.stat().st_size < 1_500_000  # sources as text; with what Cython makes of them it would be twice that


def test_the_wheel_holds_the_packages_alone(wheel, unpacked):
    assert wheel.name == f"toy-{toy.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"toy", "ggml_bridge", f"toy-{toy.__version__}.dist-info"}
    assert {name for name in names if Path(name).suffix in BUILT} == set()
    packages = {name for name in files_below(unpacked) if name.split("/")[0] in ("toy", "ggml_bridge")}
    assert packages <= names  # the .pxd too: other compiled code may call the kernels


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return email.message_from_string(archive.read(f"toy-{toy.__version__}.dist-info/METADATA").decode())


def test_the_metadata_is_complete(wheel):
    data = metadata(wheel)
    assert (data["Name"], data["Version"], data["License-Expression"]) == ("toy", toy.__version__, "MIT")
    assert data["Author"] == "The toy developers" and data["Keywords"] and data["Summary"]
    assert data["Description-Content-Type"] == "text/markdown"
    # the sdist's address stays with it: this wheel was built without TOY_REPOSITORY_URL
    urls = dict(line.split(", ") for line in data.get_all("Project-URL"))
    assert urls["Source"] == REPOSITORY and urls["Issues"] == f"{REPOSITORY}/issues"
    assert urls["Changelog"] == f"{REPOSITORY}/blob/v{toy.__version__}/CHANGELOG.md"
    with zipfile.ZipFile(wheel) as archive:
        entry_points = archive.read(f"toy-{toy.__version__}.dist-info/entry_points.txt").decode()
    assert "toy = toy.cli:main" in entry_points


def links(text):
    return re.findall(r"\]\(([^)]+)\)", text)


def test_the_links_of_the_description_lead_somewhere(wheel):
    text = metadata(wheel).get_payload()
    readme = links((ROOT / "README.md").read_text(encoding="utf-8"))
    relative = [link for link in readme if not link.startswith(("http", "#"))]
    assert len(relative) > 10
    for link in relative:
        assert (ROOT / link.split("#")[0]).exists() or not (ROOT / "notebooks").exists(), (
            f"README.md: {link} is not there"
        )
        kind = "raw" if link.endswith(".svg") else "blob"  # a picture is loaded, not looked at on a page
        assert f"{REPOSITORY}/{kind}/v{toy.__version__}/{link}" in links(text)
    assert all(link.startswith(("http", "#")) for link in links(text))
    assert len(links(text)) == len(readme)


def test_without_an_address_nothing_is_made_up(setup_py, monkeypatch):
    monkeypatch.delenv("TOY_REPOSITORY_URL", raising=False)
    if not (ROOT / "PKG-INFO").exists():  # an sdist has its address
        assert setup_py["repository_url"]() == ""
    assert setup_py["project_urls"]("") == {}
    assert setup_py["long_description"]("") == (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_version_stands_in_one_place(setup_py):
    assert setup_py["version"]() == toy.__version__
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "toy.config.VERSION"}
    assert f"## {toy.__version__} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert toy.__version__ not in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_pythons_are_the_same_everywhere():
    """Those that the classifiers name are those that are released for, and README says."""
    named = [
        line.rpartition(" ")[2] for line in PYPROJECT["project"]["classifiers"] if re.search(r"Python :: 3\.\d+$", line)
    ]
    assert f">={named[0]}" == PYPROJECT["project"]["requires-python"]
    assert PYPROJECT["tool"]["cibuildwheel"]["build"].split() == [f"cp{python.replace('.', '')}-*" for python in named]
    assert f"Python {named[0]} to {named[-1]}" in (ROOT / "README.md").read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# what they need
# ----------------------------------------------------------------------------------------------------------------------


def test_every_requirement_has_a_lower_bound():
    project = PYPROJECT["project"]
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    for line in [*PYPROJECT["build-system"]["requires"], *project["dependencies"], *extras]:
        requirement = Requirement(line)
        assert requirement.name == "toy" or [s for s in requirement.specifier if s.operator == ">="], line


def test_the_oldest_requirements_are_the_lower_bounds():
    script = ROOT / ".ci" / "oldest_requirements"
    if not script.exists():
        pytest.skip("the script of .ci/run is not in an sdist")
    lines = run(script, "ggml", "gguf", "test", cwd=ROOT).stdout.split()
    bounds = dict(line.split("==") for line in lines)
    for line in PYPROJECT["project"]["dependencies"] + PYPROJECT["project"]["optional-dependencies"]["gguf"]:
        requirement = Requirement(line)
        assert requirement.specifier == Requirement(f"a>={bounds[requirement.name]}").specifier
    assert bounds["libggml-python"] and bounds["cython"] and "toy" not in bounds


@pytest.fixture
def backend(monkeypatch):
    """build_backend.py, on a Python of which `tags` tells what wheels it takes."""
    for name in ("TOY_PURE_PYTHON", "TOY_GGML_DIR"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "build_backend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def use(*names):
        monkeypatch.setattr(module, "sys_tags", lambda: iter(tags.Tag(*tag.split("-")) for tag in names))
        return module

    return use


HOOKS = """
import json, sys
sys.path.insert(0, sys.argv.pop(1))
import build_backend
from packaging import tags
build_backend.sys_tags = lambda: iter([tags.Tag("cp311", "cp311", "manylinux_2_27_x86_64")])
names, sys.argv = sys.argv[1:], sys.argv[:1]
with open("asked.json", "w") as file:
    json.dump({name: getattr(build_backend, name)() for name in names}, file)
"""


def asked_for(project, *hooks, **environment):
    """What hooks of the backend ask for, each by its name. In a process of its own, as pip calls them: in this one a test
    may have imported the distutils of the standard library, and setuptools works with its own."""
    run("-c", HOOKS, ROOT, *hooks, cwd=project, **environment)
    return json.loads((project / "asked.json").read_text())


GGML = Requirement(PYPROJECT["project"]["optional-dependencies"]["ggml"][0])

PYTHONS = [
    # tag of the Python, what it is in a marker (implementation, version, platform, machine), is there a wheel of libggml?
    ("cp310-cp310-manylinux_2_27_x86_64", "CPython 3.10 linux x86_64", True),
    ("cp314-cp314-manylinux_2_27_aarch64", "CPython 3.14 linux aarch64", True),
    ("cp313-cp313-musllinux_1_2_x86_64", "CPython 3.13 linux x86_64", True),
    ("cp312-cp312-macosx_11_0_arm64", "CPython 3.12 darwin arm64", True),
    ("cp311-cp311-win_amd64", "CPython 3.11 win32 AMD64", True),
    ("cp314-cp314t-manylinux_2_27_x86_64", "CPython 3.14 linux x86_64", True),
    ("cp316-cp316-manylinux_2_27_x86_64", "CPython 3.16 linux x86_64", False),
    ("pp311-pypy311_pp73-manylinux_2_27_x86_64", "PyPy 3.11 linux x86_64", False),
    ("cp312-cp312-macosx_11_0_x86_64", "CPython 3.12 darwin x86_64", False),
    ("cp312-cp312-win_arm64", "CPython 3.12 win32 ARM64", False),
    ("cp312-cp312-manylinux_2_27_riscv64", "CPython 3.12 linux riscv64", False),
]


@pytest.mark.parametrize(("tag", "python", "there_is_one"), PYTHONS, ids=[row[0] for row in PYTHONS])
def test_libggml_is_asked_for_where_there_is_a_wheel(backend, tag, python, there_is_one):
    names = ("platform_python_implementation", "python_version", "sys_platform", "platform_machine")
    expected = (
        [f"libggml-python{str(GGML.specifier).replace('<0.21,>=0.20.2', '>=0.20.2,<0.21')}"] if there_is_one else []
    )
    assert backend(tag, "py3-none-any").ggml_requirement() == expected
    assert GGML.marker.evaluate(dict(zip(names, python.split()))) == there_is_one


@pytest.mark.parametrize(
    "tag",
    ["cp313-cp313t-manylinux_2_27_x86_64", "cp312-cp312-manylinux_2_17_x86_64", "cp312-cp312-musllinux_1_1_x86_64"],
)
def test_libggml_is_not_asked_for_where_its_wheels_are_too_new(backend, tag):
    """What a marker cannot tell: another ABI, an older C library."""
    assert backend(tag, "py3-none-any").ggml_requirement() == []


def test_libggml_is_not_asked_for_where_it_is_not_wanted(backend, monkeypatch, small_project):
    module = backend("cp311-cp311-manylinux_2_27_x86_64")
    assert len(module.ggml_requirement()) == 1
    for name, value in (("TOY_PURE_PYTHON", "1"), ("TOY_GGML_DIR", "/opt/ggml")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert module.ggml_requirement() == []
        hook = "get_requires_for_build_wheel"
        asked = asked_for(small_project, hook, **{name: value})[hook]
        assert not [line for line in asked if "ggml" in line]


def test_the_bridge_names_the_same_libggml(backend):
    (requirement,) = backend("cp311-cp311-manylinux_2_27_x86_64").ggml_requirement()
    assert f"pip install '{requirement}'" == loading.INSTALL


def test_the_backend_adds_it_to_the_wheel_and_the_editable_install(backend, small_project):
    expected = backend("cp311-cp311-manylinux_2_27_x86_64").ggml_requirement()
    with_it = ("get_requires_for_build_wheel", "get_requires_for_build_editable")
    asked = asked_for(small_project, *with_it, "get_requires_for_build_sdist")
    for hook in with_it:
        assert [line for line in asked[hook] if line.startswith("libggml-python")] == expected and len(expected) == 1
    assert not [line for line in asked["get_requires_for_build_sdist"] if "ggml" in line]


# ----------------------------------------------------------------------------------------------------------------------
# a build that fails
# ----------------------------------------------------------------------------------------------------------------------

GOOD = "x = 1\n"
BAD_C = 'cdef extern from *:\n    """\n    #error "not for this compiler"\n    """\nx = 1\n'
BAD_CYTHON = "cdef int x = a b\n"
KERNELS = {"toy/_kernels/cpu", "toy/_kernels/linear"}
BRIDGE = {"ggml_bridge/core", "ggml_bridge/kernels"}
CPU = (ROOT / "toy" / "_kernels" / "cpu.pyx").read_text(encoding="utf-8")


@pytest.fixture
def small_project(tmp_path):
    """A project with this setup.py, two kernels and a bridge, and the headers of a ggml: it builds in a second or two."""
    folder = tmp_path / "project"
    for package in ("toy/_kernels", "ggml_bridge"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").touch()
    for name in (
        "setup.py",
        "build_backend.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "toy/config.py",
        "toy/_kernels/cpu.h",
    ):
        shutil.copy(ROOT / name, folder / name)
    (folder / "toy" / "__init__.py").touch()
    (folder / "toy" / "_kernels" / "cpu.pyx").write_text(CPU, encoding="utf-8")
    for module in ("toy/_kernels/linear", "ggml_bridge/core", "ggml_bridge/kernels"):
        (folder / f"{module}.pyx").write_text(GOOD)
    ggml = tmp_path / "ggml"
    for path, text in (
        ("include/ggml.h", ""),
        ("lib/cmake/ggml/ggml-version.cmake", 'set(PACKAGE_VERSION "0.20.2")\n'),
    ):
        (ggml / path).parent.mkdir(parents=True)
        (ggml / path).write_text(text)
    return folder


def compiled(folder):
    """The names of the extension modules of this Python below a folder, without the suffix."""
    return {path.relative_to(folder).as_posix()[: -len(SUFFIX)] for path in folder.rglob(f"*{SUFFIX}")}


def build_in_place(project, **environment):
    places = {"TOY_GGML_DIR": project.parent / "ggml", "TOY_MARCH": ""}
    command = ("setup.py", "build_ext", "--inplace", "--force")
    result = run(*command, cwd=project, check=False, **places | environment)
    shutil.rmtree(project / "build", ignore_errors=True)
    return result


needs_compiler = pytest.mark.skipif(
    shutil.which((sysconfig.get_config_var("CC") or "cl").split()[0]) is None, reason="there is no C compiler"
)

# what goes wrong -> (a source to break, what becomes of it, variables), what is there afterwards
ACCIDENTS = {
    "nothing": (None, GOOD, {}, KERNELS | BRIDGE),
    "a kernel does not compile": ("toy/_kernels/linear", BAD_C, {}, {"ggml_bridge/core"}),
    "a kernel is not Cython": ("toy/_kernels/linear", BAD_CYTHON, {}, {"ggml_bridge/core"}),
    "the first kernel does not compile": ("toy/_kernels/cpu", BAD_C, {}, {"ggml_bridge/core"}),
    "the bridge does not compile": ("ggml_bridge/core", BAD_C, {}, KERNELS),
    "the bridge is not Cython": ("ggml_bridge/core", BAD_CYTHON, {}, KERNELS),
    "the bridge's kernels do not compile": ("ggml_bridge/kernels", BAD_C, {}, KERNELS),
    "there are no headers": (None, GOOD, {"TOY_GGML_DIR": "/nowhere"}, KERNELS),
    "there is no compiler": (None, GOOD, {"CC": "/bin/false", "CXX": "/bin/false"}, set()),
    "the compiler is not a program": (None, GOOD, {"CC": "/nowhere/cc", "CXX": "/nowhere/c++"}, set()),
    "nothing is to be compiled": (None, GOOD, {"TOY_PURE_PYTHON": "1"}, set()),
}


@needs_compiler
@pytest.mark.skipif(sys.platform == "win32", reason="variables of other compilers")
@pytest.mark.parametrize("accident", ACCIDENTS)
def test_a_part_that_is_not_built_leaves_nothing_old_behind(small_project, accident):
    source, text, environment, left = ACCIDENTS[accident]
    foreign = small_project / "toy" / "_kernels" / "linear.cpython-39-x86_64-linux-gnu.so"
    old = KERNELS | BRIDGE | {"toy/_kernels/of_an_earlier_version"}
    for name in old:
        (small_project / f"{name}{SUFFIX}").write_bytes(b"of an earlier build")
    foreign.write_bytes(b"of another Python")
    if source is not None:
        (small_project / f"{source}.pyx").write_text(text)
    result = build_in_place(small_project, **environment)
    assert result.returncode == 0, result.stderr
    found = compiled(small_project)
    if left >= KERNELS:
        left = left | {"toy/_kernels/of_an_earlier_version"}
    assert found == left
    for name in left - {"toy/_kernels/of_an_earlier_version"}:
        assert (small_project / f"{name}{SUFFIX}").read_bytes() != b"of an earlier build"
    assert foreign.exists()
    said = [line for line in result.stderr.splitlines() if line.startswith("toy: ")]
    assert bool(said) == (accident != "nothing")
    if not left >= KERNELS and "TOY_PURE_PYTHON" not in environment:
        assert any("the compiled kernels: not built, " in line for line in said)
        assert any("install a C compiler" in line for line in said)


@needs_compiler
@pytest.mark.skipif(sys.platform == "win32", reason="variables of other compilers")
@pytest.mark.parametrize("accident", ["a kernel does not compile", "a kernel is not Cython", "there is no compiler"])
def test_a_required_build_that_fails_is_an_error(small_project, accident):
    source, text, environment, _ = ACCIDENTS[accident]
    assert build_in_place(small_project, TOY_REQUIRE_KERNELS=1).returncode == 0
    if source is not None:
        (small_project / f"{source}.pyx").write_text(text)
    assert build_in_place(small_project, TOY_REQUIRE_KERNELS=1, **environment).returncode != 0


@needs_compiler
@pytest.mark.skipif(sys.platform == "win32", reason="variables of other compilers")
def test_a_wheel_has_no_extension_of_an_earlier_build(small_project, tmp_path):
    """setuptools packs all that lies in its build folder, where an earlier build may have succeeded."""
    ggml = {"TOY_GGML_DIR": small_project.parent / "ggml", "TOY_MARCH": ""}
    command = ("setup.py", "-q", "bdist_wheel", "-d")
    for dist, text, expected in (("good", GOOD, KERNELS | BRIDGE), ("bad", BAD_C, {"ggml_bridge/core"})):
        source = small_project / "toy" / "_kernels" / "linear.pyx"
        source.write_text(text)
        later = source.stat().st_mtime + 10
        os.utime(source, (later, later))
        run(*command, tmp_path / dist, cwd=small_project, **ggml)
        (wheel,) = (tmp_path / dist).iterdir()
        names = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(SUFFIX)}
        assert names == {f"{name}{SUFFIX}" for name in expected}


@needs_compiler
def test_an_editable_install_compiles_in_place_and_a_pure_one_removes_it(small_project, tmp_path):
    code = "import sys, build_backend; build_backend.build_editable(sys.argv[1])"
    ggml = {"TOY_GGML_DIR": small_project.parent / "ggml", "TOY_MARCH": ""}
    run("-c", code, tmp_path, cwd=small_project, TOY_REQUIRE_KERNELS=1, **ggml)
    assert compiled(small_project) >= KERNELS | BRIDGE
    shutil.rmtree(small_project / "build", ignore_errors=True)
    run("-c", code, tmp_path, cwd=small_project, TOY_PURE_PYTHON=1)
    assert compiled(small_project) == set()


# ----------------------------------------------------------------------------------------------------------------------
# for which CPU
# ----------------------------------------------------------------------------------------------------------------------

# What compilers define for -march besides the instruction sets that they use unasked in plain C (those are in cpu.h).
ONLY_BY_INTRINSIC = {
    "x86_64": {
        *(
            "aes",
            "vaes",
            "sha",
            "kl",
            "widekl",
            "3dnow",
            "3dnow_a",
            "sgx",
            "hle",
            "rtm",
            "tsxldtrk",
            "uintr",
            "shstk",
            "pku",
        ),
        *(
            "amx_bf16",
            "amx_int8",
            "amx_tile",
            "amx_fp16",
            "amx_complex",
            "raoint",
            "cmpccxadd",
            "enqcmd",
            "hreset",
            "lwp",
        ),
        *(
            "cldemote",
            "clflushopt",
            "clwb",
            "clzero",
            "movdir64b",
            "movdiri",
            "wbnoinvd",
            "invpcid",
            "prefetchi",
            "prfchw",
        ),
        *(
            "prefetchwt1",
            "fsgsbase",
            "mwaitx",
            "waitpkg",
            "pconfig",
            "ptwrite",
            "rdpid",
            "rdrnd",
            "rdseed",
            "serialize",
        ),
        *("xsave", "xsavec", "xsaveopt", "xsaves"),
    },
    "aarch64": {
        *(
            "aes",
            "crypto",
            "sha2",
            "sha512",
            "sm3",
            "sm4",
            "sve2_aes",
            "sve2_sm4",
            "rng",
            "ls64",
            "tme",
            "memory_tagging",
        ),
        "sve_vector_operators",  # of the compiler, not of the CPU
    },
}
COMPILERS = {"x86_64": "gcc", "aarch64": "aarch64-linux-gnu-gcc"}
ARM_EXTENSIONS = (
    "+crypto+sha3+sm4+fp16fml+dotprod+rng+i8mm+bf16+sve2-aes+sve2-bitperm+sve2-sha3+sve2-sm4+f32mm+f64mm+ls64+tme"
)


def macros(compiler, *flags):
    command = [compiler, "-O3", *flags, "-dM", "-E", "-x", "c", os.devnull]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout if result.returncode == 0 else None


def architectures(compiler):
    """All values of -march that the compiler knows, by its own word."""
    said = subprocess.run(
        [compiler, "-march=none-such", "-E", "-x", "c", os.devnull],
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "C"},
    ).stderr
    found = re.search(r"valid arguments (?:to .* )?are: (.*)", said)
    return [word.strip(";") for word in found[1].split() if "?" not in word and "native" not in word] if found else []


def asked_about(machine):
    """The names in cpu.h's table for a machine."""
    header = (ROOT / "toy" / "_kernels" / "cpu.h").read_text(encoding="utf-8")
    x86, _, arm = header.partition("#elif defined(__aarch64__)")
    return set(re.findall(r'^    \{"(\w+)",', x86 if machine == "x86_64" else arm, re.M))


@pytest.mark.parametrize("machine", COMPILERS)
def test_every_instruction_set_of_every_march_is_asked_about(setup_py, machine):
    compiler = COMPILERS[machine]
    if shutil.which(compiler) is None or not architectures(compiler):
        pytest.skip(f"there is no {compiler} here")
    if machine == "x86_64" and "__x86_64__" not in macros(compiler):
        pytest.skip("another kind of machine")
    known, baseline = asked_about(machine), macros(compiler)
    marches = architectures(compiler)
    if machine == "aarch64":
        marches += [f"{march}{ARM_EXTENSIONS}" for march in marches]
    asked, seen = set(), 0
    for march in marches:
        text = macros(compiler, f"-march={march}")
        if text is None or (machine == "x86_64" and "__x86_64__" not in text):
            continue
        seen += 1
        features = set(setup_py["cpu_features"](text, baseline))
        asked |= features & known
        assert features - known <= set(ONLY_BY_INTRINSIC[machine]), f"-march={march}"
    assert seen >= 5
    some = (
        {"avx2", "fma", "avx512f", "f16c", "lzcnt", "sse4_2"} if machine == "x86_64" else {"sve", "dotprod", "atomics"}
    )
    assert some <= asked


def test_macros_become_names(setup_py):
    features = setup_py["cpu_features"]
    macros = """#define __AVX2__ 1
#define __SSE4_2__ 1
#define __ARM_FEATURE_SVE 1
#define __ARM_FEATURE_FP16_VECTOR_ARITHMETIC 1
#define __ARM_FEATURE_SVE_BITS 0
#define __A_NEW_SET__ 1
#define __BIGGEST_ALIGNMENT__ 32
#define __FLT16_HAS_DENORM__ 1
#define __FP_FAST_FMA 1
#define __GCC_HAVE_SYNC_COMPARE_AND_SWAP_16 1
#define __haswell__ 1
#define __SSE2__ 1
"""
    expected = ["a_new_set", "avx2", "fp16_vector_arithmetic", "sse4_2", "sve"]
    assert features(macros, "#define __SSE2__ 1\n") == expected
    assert features(macros, macros) == []


def cpuinfo_flags():
    path = Path("/proc/cpuinfo")
    found = re.search(r"^flags\s*: (.*)", path.read_text(), re.M) if path.exists() else None
    return set(found[1].split()) if found else None


# Linux' names, where they differ
CPUINFO = {
    "sse3": "pni", "pclmul": "pclmulqdq", "bmi": "bmi1", "lzcnt": "abm", "crc32": "sse4_2", "lahf_sahf": "lahf_lm",
    "avxvnni": "avx_vnni", "avxifma": "avx_ifma", "avx512vbmi2": "avx512_vbmi2", "avx512vnni": "avx512_vnni",
    "avx512bitalg": "avx512_bitalg", "avx512vpopcntdq": "avx512_vpopcntdq", "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16", "avx512vp2intersect": "avx512_vp2intersect", "avx5124vnniw": "avx512_4vnniw",
    "avx5124fmaps": "avx512_4fmaps",
}  # fmt: skip
NOT_IN_CPUINFO = {"avxvnniint8", "avxvnniint16", "avxneconvert"}


def test_this_cpu_has_what_the_system_says(kernels):
    from toy._kernels import cpu

    flags = cpuinfo_flags()
    if flags is None:
        pytest.skip("reads the flags of an x86 processor in /proc/cpuinfo")
    names = asked_about("x86_64") - NOT_IN_CPUINFO
    assert len(names) > 30
    assert {name: cpu.has(name) for name in names} == {name: CPUINFO.get(name, name) in flags for name in names}
    assert cpu.has("of_the_future") is None


ASK_ALL = """
#include <stdio.h>
#include "cpu.h"
int main(void) {
    for (size_t i = 0; i < sizeof toy_cpu_features / sizeof *toy_cpu_features; i++)
        if (toy_cpu_has(toy_cpu_features[i].name) == 1) printf("%s ", toy_cpu_features[i].name);
    printf("%d", toy_cpu_has("of_the_future"));
    return 0;
}
"""
# what these have and what they lack, by their makers' manuals
ARM_CPUS = {
    "cortex-a53": ({"crc32"}, {"atomics", "dotprod", "sve", "fp16_vector_arithmetic"}),
    "neoverse-n1": ({"crc32", "atomics", "dotprod", "qrdmx", "fp16_vector_arithmetic"}, {"sve", "matmul_int8", "jcvt"}),
    "a64fx": ({"crc32", "atomics", "sve", "complex"}, {"sve2", "dotprod", "bf16_vector_arithmetic"}),
    "max": ({"sve2", "matmul_int8", "bf16_vector_arithmetic", "dotprod", "frint", "sve_matmul_fp32"}, set()),
}


def test_arm_cpus_are_told_apart(tmp_path):
    """In an emulator: no such machine runs these tests."""
    if shutil.which("qemu-aarch64") is None or shutil.which(COMPILERS["aarch64"]) is None:
        pytest.skip("there is no emulator or no compiler (Debian: qemu-user, gcc-aarch64-linux-gnu)")
    source, program = tmp_path / "ask.c", tmp_path / "ask"
    source.write_text(ASK_ALL)
    include = ["-I", ROOT / "toy" / "_kernels"]
    subprocess.run(
        [COMPILERS["aarch64"], "-std=c11", "-Werror", "-Wall", "-static", *include, source, "-o", program], check=True
    )
    for cpu, (has, lacks) in ARM_CPUS.items():
        command = ["qemu-aarch64", "-cpu", cpu, program]
        *found, unknown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        assert has <= set(found) and not lacks & set(found), cpu
        assert unknown == "-1"


@needs_compiler
def test_the_kernels_know_what_they_were_compiled_for(small_project):
    """The macros of -march reach cpu.pyx, which itself is compiled without it."""
    compiler = (sysconfig.get_config_var("CC") or "cl").split()[0]
    if not macros(compiler, "-march=x86-64-v3"):
        pytest.skip("the compiler is not for x86-64")
    result = build_in_place(small_project, TOY_MARCH="x86-64-v3")
    (line,) = (line for line in result.stdout.splitlines() if " -c " in line and "cpu.c" in line)
    assert "-march" not in line.rpartition(" -o ")[2]  # its macros do name the flags of the others
    code = "from toy._kernels import cpu; print(cpu.compile_flags()); print(*cpu.target_features())"
    flags, features = run("-c", code, cwd=small_project).stdout.splitlines()
    assert "-march=x86-64-v3" in flags
    assert {"avx2", "fma", "f16c", "bmi2", "lzcnt", "movbe"} <= set(features.split())
    assert "avx512f" not in features
    result = build_in_place(small_project, TOY_MARCH="none-such")
    assert "does not take -march=none-such" in result.stderr and result.returncode == 0


def test_microsofts_compiler(setup_py, monkeypatch, capsys):
    """It knows no -march. Its options, and what they allow, by reading its manual: nothing here runs on Windows."""
    import ctypes

    architecture = setup_py["msvc_architecture"]
    flags, features = architecture("x86-64-v3")
    assert flags == ["/arch:AVX2"] and {"avx2", "fma"} <= set(features) <= asked_about("x86_64")
    assert architecture("x86-64-v4")[0] == ["/arch:AVX512"] and "avx512f" in architecture("x86-64-v4")[1]
    for march in ("", "x86-64", "x86-64-v2"):
        assert architecture(march) == ([], [])
    assert capsys.readouterr().err == ""
    assert architecture("znver4") == ([], [])
    assert "znver4" in capsys.readouterr().err
    for has_avx2 in (0, 1):
        kernel32 = types.SimpleNamespace(IsProcessorFeaturePresent={40: has_avx2}.get)
        windows = types.SimpleNamespace(kernel32=kernel32)
        monkeypatch.setattr(ctypes, "windll", windows, raising=False)
        assert architecture("native")[0] == (["/arch:AVX2"] if has_avx2 else [])


# ----------------------------------------------------------------------------------------------------------------------
# Windows, by reading
# ----------------------------------------------------------------------------------------------------------------------

# a path -> how it is typed for cmd and PowerShell, and for a POSIX shell
PATHS = {
    "runs/a": ("runs/a", "runs/a"),
    r"C:\runs\a": (r"C:\runs\a", r"'C:\runs\a'"),
    "my runs": ('"my runs"', "'my runs'"),
    "a&b": ('"a&b"', "'a&b'"),
    "it's": ('"it\'s"', "'it'\"'\"'s'"),
    "$HOME": ('"$HOME"', "'$HOME'"),
    "": ('""', "''"),
}


@pytest.mark.parametrize("path", PATHS)
def test_commands_to_type_are_quoted_for_the_shell_there_is(monkeypatch, path):
    from toy.cli import base

    for name, expected in zip(("nt", "posix"), PATHS[path]):
        monkeypatch.setattr(base, "os", types.SimpleNamespace(name=name))
        assert base.quoted(path) == expected


@pytest.mark.parametrize("file", ["train.py", "models.py", "main.py", "progress.py"])
def test_one_place_quotes(file):
    assert "shlex" not in (ROOT / "toy" / "cli" / file).read_text(encoding="utf-8")


PYTHON_FILES = sorted(path for package in ("toy", "ggml_bridge") for path in (ROOT / package).rglob("*.py"))


def calls_of(path):
    """(name as it is written, the call) for each call in a file."""
    import ast

    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def text_writes(path):
    """The calls that write text whose newlines Windows would double, or in an encoding that is the system's."""
    import ast

    for name, call in calls_of(path):
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        mode = keywords.get("mode") or (ast.unparse(call.args[1]) if name == "open" and len(call.args) > 1 else "'r'")
        if name == "open" and "b" not in mode and not ({"newline", "encoding"} <= keywords.keys() or "'r'" in mode):
            yield call
        if name.endswith(".write_text") and "newline" not in keywords and name != "self.write_text":
            yield call
        if (
            name == "os.open"
            and "O_CREAT" in ast.unparse(call)
            and "O_WRONLY" in ast.unparse(call)
            and "_BINARY" not in ast.unparse(call)
        ):
            yield call


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_are_the_same_on_every_system(path):
    assert [call.lineno for call in text_writes(path)] == []


def test_a_write_that_differs_would_be_found(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(
        'open(a, "w", encoding="utf-8")\nopen(a, "wb")\nopen(a, "w", newline="", encoding="utf-8")\nopen(a)\n'
        'p.write_text(t)\nos.open(a, os.O_WRONLY | os.O_CREAT)\nos.open(a, os.O_RDONLY)\nopen(a, mode="a")\n'
    )
    assert sorted(call.lineno for call in text_writes(path)) == [1, 5, 6, 8]
