"""Models on this machine: found in the caches of other programs, called by name, and told what they are by their heads."""

import hashlib
import json
import os
import shutil
import struct

import numpy as np
import pytest
from model_files import tokenizer, write_files, write_model

import toy
from toy.files import places
from toy.files.gguf import GGUF
from toy.files.gguf_write import _write
from toy.files.places import find_model, head_of, models_in_caches


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model file with a tokenizer, and an adapter for it."""
    folder = tmp_path_factory.mktemp("small")
    write_files(folder)
    write_model(folder / "small.gguf", tokenizer=tokenizer())
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with no models in it."""
    for name in (
        "TOY_CACHE",
        "HF_HOME",
        "HF_HUB_CACHE",
        "OLLAMA_MODELS",
        "LLAMA_CACHE",
        "XDG_CACHE_HOME",
        "LOCALAPPDATA",
    ):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(places.sys, "platform", "linux")
    return tmp_path


def put(path, source):
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, path)
    return path


def in_hub(root, repository, name, source, commit="a" * 40, main=True):
    folder = root / f"models--{repository.replace('/', '--')}"
    path = put(folder / "snapshots" / commit / name, source)
    if main:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)
    return path


def in_ollama(root, name, source, more=(), registry="registry.ollama.ai", namespace="library"):
    model, _, tag = name.partition(":")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    path = put(root / "blobs" / f"sha256-{digest}", source)
    manifest = root / "manifests" / registry / namespace / model / tag
    manifest.parent.mkdir(parents=True, exist_ok=True)
    layers = [{"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"}, *more]
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    return path


def names():
    return {found.name: (found.place, found.path) for found in models_in_caches()}


def test_every_cache_and_what_its_models_are_called(home, small):
    model, cache = small / "small.gguf", home / ".cache"
    hub, studio = cache / "huggingface" / "hub", home / ".lmstudio" / "models"
    expected = {
        "anna/one": ("Hugging Face", in_hub(hub, "anna/one", "one-q8.gguf", model)),
        "anna/two/a.gguf": ("Hugging Face", in_hub(hub, "anna/two", "a.gguf", model)),
        "anna/two/sub/b.gguf": ("Hugging Face", in_hub(hub, "anna/two", "sub/b.gguf", model)),
        "berta/mine": ("toy", in_hub(cache / "toy" / "hub", "berta/mine", "m.gguf", model)),
        "carl/three": ("LM Studio", put(studio / "carl" / "three" / "three.gguf", model)),
        "small:1b": ("Ollama", in_ollama(home / ".ollama" / "models", "small:1b", model)),
        "dora/x:latest": ("Ollama", in_ollama(home / ".ollama" / "models", "x:latest", model, namespace="dora")),
        "here.org/dora/y:q8": (
            "Ollama", in_ollama(home / ".ollama" / "models", "y:q8", model, registry="here.org", namespace="dora"),
        ),
        "four.gguf": ("llama.cpp", put(cache / "llama.cpp" / "four.gguf", model)),
    }  # fmt: skip
    assert names() == expected
    for name, (_, path) in expected.items():
        assert find_model(name) == path
    assert find_model("dora/x") == expected["dora/x:latest"][1]


def test_the_variables_of_the_programs_are_kept(home, small, monkeypatch, tmp_path):
    model = small / "small.gguf"
    for variable, folder in (
        ("TOY_CACHE", "t"), ("HF_HOME", "h"), ("OLLAMA_MODELS", "o"), ("LLAMA_CACHE", "l"),
    ):  # fmt: skip
        monkeypatch.setenv(variable, str(tmp_path / "elsewhere" / folder))
    root = tmp_path / "elsewhere"
    in_hub(root / "t" / "hub", "a/t", "m.gguf", model)
    in_hub(root / "h" / "hub", "a/h", "m.gguf", model)
    in_ollama(root / "o", "o:1", model)
    put(root / "l" / "l.gguf", model)
    assert names().keys() == {"a/t", "a/h", "o:1", "l.gguf"}
    monkeypatch.setenv("HF_HUB_CACHE", str(root / "hub2"))
    in_hub(root / "hub2", "a/h2", "m.gguf", model)
    assert names().keys() == {"a/t", "a/h2", "o:1", "l.gguf"}


def test_a_model_of_a_cache_is_used_by_its_name_everywhere(home, small, toy_command, monkeypatch):
    path = in_ollama(home / ".ollama" / "models", "small:1b", small / "small.gguf")
    monkeypatch.chdir(home)
    by_path = toy_command("generate", path, "--prompt", "a", "--tokens", 5, "--seed", 1)
    assert (
        by_path[0] == 0 and toy_command("generate", "small:1b", "--prompt", "a", "--tokens", 5, "--seed", 1) == by_path
    )
    assert toy_command("describe", "small:1b") == toy_command("describe", path)
    assert toy.load("small:1b").config == toy.load(path).config
    code, _, err = toy_command("export", "small:1b", "--out", "copy.gguf")
    assert code == 0, err
    (home / "text.txt").write_text("a b c d e f g h i j " * 200)
    command = (
        "train",
        "lora",
        "--model",
        "small:1b",
        "--corpus",
        "text.txt",
        "--steps",
        1,
        "--context",
        8,
        "--out",
        "r",
    )
    code, _, err = toy_command(*command, "--backend", "numpy", "--save-every", 1)
    assert code == 0, err
    assert json.loads((home / "r" / "config.json").read_text())["training"]["model"] == str(path)


def test_a_name_that_two_files_have_is_refused(home, small):
    first = in_hub(home / ".cache" / "huggingface" / "hub", "anna/one", "m.gguf", small / "small.gguf")
    assert find_model("anna/one") == first
    second = put(home / ".lmstudio" / "models" / "anna" / "one" / "m.gguf", small / "small.gguf")
    with pytest.raises(
        ValueError, match=r"names 2 files: .* \(Hugging Face\) and .* \(LM Studio\)\. Give the path"
    ) as error:
        find_model("anna/one")
    assert str(first) in str(error.value) and str(second) in str(error.value)


@pytest.mark.parametrize("name", ["nothing", "../small.gguf", "/nowhere", "~/x", "a\0b", "x" * 400, "", "small:2b"])
def test_what_is_no_name_is_told(home, small, name, monkeypatch):
    monkeypatch.chdir(home)
    in_ollama(home / ".ollama" / "models", "small:1b", small / "small.gguf")
    assert find_model("small:1b")
    if name == "":
        return  # the folder that one is in
    with pytest.raises((OSError, ValueError), match=r"toy list|null|too long"):
        find_model(name)


def test_of_the_checkouts_of_a_repository_main_counts_then_the_newest(home, small):
    hub, model = home / ".cache" / "huggingface" / "hub", small / "small.gguf"
    old = in_hub(hub, "a/b", "m.gguf", model, commit="a" * 40, main=False)
    new = in_hub(hub, "a/b", "m.gguf", model, commit="b" * 40, main=False)
    os.utime(old.parent, (1, 1))
    assert find_model("a/b") == new
    (hub / "models--a--b" / "refs").mkdir()
    (hub / "models--a--b" / "refs" / "main").write_text("a" * 40 + "\n")
    assert find_model("a/b") == old
    for bad in ("../../x", "c" * 40, "\xff", ""):
        (hub / "models--a--b" / "refs" / "main").write_text(bad, encoding="latin-1")
        assert find_model("a/b") == new


BAD_MANIFESTS = {
    "not JSON": "{", "no object": "3", "no layers": "{}", "layers no list": '{"layers": 3}',
    "layer no object": '{"layers": [3]}',
    "deep": "[" * 100_000, "large": json.dumps({"layers": [], "x": "x" * 2**21}), "empty": '{"layers": []}',
    "a path": json.dumps(
        {"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:../../../etc/passwd"}]}
    ),
    "no digest": json.dumps({"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": 5}]}),
}  # fmt: skip


@pytest.mark.parametrize("manifest", BAD_MANIFESTS)
def test_a_bad_manifest_is_listed_with_what_is_wrong(home, small, toy_command, manifest):
    root = home / ".ollama" / "models"
    in_ollama(root, "good:1", small / "small.gguf")
    bad = root / "manifests" / "registry.ollama.ai" / "library" / "bad" / "1"
    bad.parent.mkdir()
    bad.write_text(BAD_MANIFESTS[manifest])
    assert find_model("good:1")
    with pytest.raises(ValueError, match=r"bad:1 cannot be used by its name: .*manifest"):
        find_model("bad:1")
    code, out, _ = toy_command("list", "--json")
    assert code == 0 and [json.loads(line)["usable"] for line in out.splitlines()] == [False, True]


def test_an_adapter_beside_a_model_is_not_left_out_silently(home, small):
    layer = {"mediaType": "application/vnd.ollama.image.adapter", "digest": "sha256:" + "0" * 64}
    path = in_ollama(home / ".ollama" / "models", "tuned:1", small / "small.gguf", [layer])
    with pytest.raises(ValueError, match=rf"take the model {path} with --adapter .*sha256-0000"):
        find_model("tuned:1")


def test_what_a_head_says(small, tmp_path):
    model = head_of(small / "small.gguf")
    size = (small / "small.gguf").stat().st_size
    assert model == ("llama", size, "q8_0", "model", None)
    assert head_of(small / "adapter.gguf")._replace(n_bytes=0, type="") == ("llama", 0, "", "adapter", None)
    a_matrix = [("token_embd.weight", np.zeros((4, 32), np.float32), "F32")]
    for keys, problem in (
        ({"general.architecture": "mamba"}, "holds a model of architecture 'mamba'"),
        ({"general.architecture": "llama", "llama.expert_count": 8}, "mixture of experts"),
        ({"general.architecture": "llama", "general.type": "imatrix"}, "is not a model"),
    ):
        _write(tmp_path / "m.gguf", keys, a_matrix)
        assert problem in head_of(tmp_path / "m.gguf").problem
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(100))
    assert "version 0" in head_of(tmp_path / "m.gguf").problem or "big-endian" in head_of(tmp_path / "m.gguf").problem
    assert "No such file" in head_of(tmp_path / "none.gguf").problem
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "not a regular file" in head_of(tmp_path / "pipe.gguf").problem


def test_the_head_ends_before_the_vocabulary(small, tmp_path):
    """What lies behind it is not read: neither its hundred thousand strings nor what may be damaged there."""
    with GGUF.open(small / "small.gguf") as gguf:
        whole = dict(gguf.metadata)
    data = (small / "small.gguf").read_bytes()
    place = data.index(b"tokenizer.ggml.tokens")
    (tmp_path / "cut.gguf").write_bytes(data[: place + 40])
    head = toy.files.gguf.read_head(tmp_path / "cut.gguf")
    assert head.items() <= whole.items() and head["llama.block_count"] == 2 and "tokenizer.ggml.tokens" not in head
    assert head_of(tmp_path / "cut.gguf").problem is None
    (tmp_path / "cut.gguf").write_bytes(data[: data.index(b"llama.block_count") + 8])
    assert "cut off" in head_of(tmp_path / "cut.gguf").problem or "too many" in head_of(tmp_path / "cut.gguf").problem


def test_a_split_model_is_one(home, small):
    folder = home / ".lmstudio" / "models" / "a" / "b"
    for i in (1, 2):
        put(folder / f"m-0000{i}-of-00002.gguf", small / "small.gguf")
    assert names().keys() == {"a/b"} and find_model("a/b").name == "m-00001-of-00002.gguf"
    assert head_of(find_model("a/b")).n_bytes == 2 * (small / "small.gguf").stat().st_size
    (folder / "m-00002-of-00002.gguf").unlink()
    assert "m-00002-of-00002.gguf: No such file" in head_of(find_model("a/b")).problem


def test_the_list(home, small, toy_command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = toy_command("list")
    assert code == 0 and out.startswith("No model in\n  toy: ") and "toy fetch smollm2-135m" in out
    studio = home / ".lmstudio" / "models" / "carl"
    put(studio / "three" / "three.gguf", small / "small.gguf")
    put(studio / "tuned" / "tuned.gguf", small / "adapter.gguf")
    (studio / "broken").mkdir()
    (studio / "broken" / "m.gguf").write_bytes(b"no \x1b[31m model at all, but long enough")
    code, out, _ = toy_command("list")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0 and lines[0] == ["name", "architecture", "type", "size", "run", "and", "train", "of"]
    assert [line[0] for line in lines[1:]] == ["carl/broken", "carl/three", "carl/tuned"]
    assert lines[2][1:3] == ["llama", "q8_0"] and lines[2][-3:] == ["yes", "LM", "Studio"]
    assert "is not a GGUF file" in out and "with --adapter" in out and "\x1b" not in out
    assert [line.split()[0] for line in toy_command("list", "THREE", "carl")[1].splitlines()[1:]] == ["carl/three"]
    code, out, _ = toy_command("list", "--json", "three")
    (record,) = map(json.loads, out.splitlines())
    assert record["usable"] is True and record["name"] == "carl/three" and record["n_bytes"] > 0
    assert toy_command("list", "nothing")[1].startswith("No model with 'nothing' in its name")


def test_folders_that_cannot_be_read_or_lead_in_a_circle_have_no_models(home, small):
    studio = home / ".lmstudio" / "models"
    put(studio / "a" / "b" / "m.gguf", small / "small.gguf")
    (studio / "a" / "b" / "again").symlink_to(studio)
    (home / ".ollama").write_text("no folder")
    (studio / "a" / "c").symlink_to(home / "nowhere")
    assert names().keys() == {"a/b"}


def test_a_thousand_heads_are_read_with_little(home, small, tmp_path):
    """What a list of a thousand files costs: some kB of each, whatever their vocabulary (measured in bytes that are touched,
    because a stop-watch would measure the machine)."""
    vocabulary = [f"token {i}" for i in range(100_000)]
    keys = {"general.architecture": "llama", "llama.block_count": 1, "tokenizer.ggml.tokens": vocabulary}
    _write(tmp_path / "large.gguf", keys, [("token_embd.weight", np.zeros((4, 32), np.float32), "F32")])
    strings = []
    monkey = toy.files.gguf._Header.strings
    try:
        toy.files.gguf._Header.strings = lambda *given: strings.append(given) or monkey(*given)
        assert head_of(tmp_path / "large.gguf").problem is None and not strings
        GGUF.open(tmp_path / "large.gguf").close()
        assert strings
    finally:
        toy.files.gguf._Header.strings = monkey


def test_lies_about_counts_cost_nothing(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60) + bytes(64))
    assert "too many" in head_of(path).problem
