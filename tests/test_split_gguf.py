"""Models that llama.cpp's gguf-split has cut into several files: opened as one, refused by name when they are not whole."""

import gc
import mmap

import numpy as np
import pytest
from single_thread import single_thread  # noqa: F401 (autouse)

import toy
from toy.files import BadFileError
from toy.files.gguf import GGUF, part_number, parts_of
from toy.files.gguf_write import write_gguf

gguf_package = pytest.importorskip("gguf", reason="quantised files need the gguf package")
pytest.importorskip("tokenizers", reason="the tokenizers library is not installed (pip install tokenizers)")

model_files = pytest.importorskip("model_files")

N = 3


def split(source, folder, name="model", first_has_tensors=True, change=lambda i, writer: None):
    """Cut a file as gguf-split does: all keys in the first part, three split.* keys in each."""
    reader, paths = gguf_package.GGUFReader(source), []
    groups = [
        list(group) for group in np.array_split(np.arange(len(reader.tensors)), N if first_has_tensors else N - 1)
    ]
    groups = groups if first_has_tensors else [[], *groups]
    with GGUF.open(source) as whole:
        for i, group in enumerate(groups):
            path = folder / f"{name}-{i + 1:05}-of-{N:05}.gguf"
            writer = gguf_package.GGUFWriter(path, whole.architecture)
            if i > 0:
                writer.kv_data[0].clear()
            writer.add_uint16("split.no", i)
            writer.add_uint16("split.count", N)
            writer.add_int32("split.tensors.count", len(reader.tensors))
            if i == 0:
                for field in reader.fields.values():
                    if not field.name.startswith(("GGUF.", "general.architecture")):
                        kind, inner = field.types[0], field.types[1] if len(field.types) > 1 else None
                        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
            for j in group:
                tensor = reader.tensors[j]
                writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
            change(i, writer)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            paths.append(path)
    return paths


def test_the_files_of_a_model_by_the_name_of_the_first(tmp_path):
    assert parts_of(tmp_path / "a-00001-of-00002.gguf") == [tmp_path / f"a-0000{i}-of-00002.gguf" for i in (1, 2)]
    for name in ("whole.gguf", "a-00001-of-00000.gguf", "a-00001-of-99999.gguf", "a-1-of-2.gguf"):
        assert parts_of(tmp_path / name) == [tmp_path / name]
    assert part_number("a-00002-of-00003.gguf") == 2 and part_number("whole.gguf") is None


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    model_files.write_files(folder)
    return folder / "llama.gguf"


@pytest.mark.parametrize("first_has_tensors", [True, False])
def test_the_parts_are_the_model(whole, tmp_path, first_has_tensors):
    paths = split(whole, tmp_path, first_has_tensors=first_has_tensors)
    with GGUF.open(whole) as one:
        for path in paths:  # by any of them
            with GGUF.open(path) as many:
                assert many.tensors.keys() == one.tensors.keys()
                assert (many.n_parameters, many.n_bytes) == (one.n_parameters, one.n_bytes)
                assert many.config() == one.config()
                for name, record in one.tensors.items():
                    assert (many.tensors[name].type, many.tensors[name].shape) == (record.type, record.shape)
                    assert np.array_equal(many.raw(name), one.raw(name))
                more = set(many.metadata) - set(one.metadata)
                assert more == {"split.no", "split.count", "split.tensors.count"}
            with pytest.raises(ValueError, match="is closed"):
                many.raw(name)


def test_it_trains_generates_and_is_exported(whole, tmp_path):
    first = split(whole, tmp_path)[0]
    a, b = toy.load(whole), toy.load(first)
    assert a.generate("hi", n_tokens=8, temperature=0) == b.generate("hi", n_tokens=8, temperature=0)
    losses = []
    for path in (whole, first):
        with GGUF.open(path) as gguf:
            recipe = toy.recipes.LoRA(backend="numpy").realize(gguf, None, 2, toy.RecipeOptions(t_seq=6))
            ids = np.arange(7)[None] + 3
            row = recipe.adamw(lr=0.01).hp_for_step(0)
            losses.append([recipe.step(ids[:, :-1], labels=ids[:, 1:], hp=row, is_first=k == 0) for k in range(3)])
    assert losses[0] == losses[1]
    from toy.trained import read_trained
    from toy.trained.export import export_model

    export_model(read_trained(first), tmp_path / "one.gguf", "keep")
    with GGUF.open(whole) as one, GGUF.open(tmp_path / "one.gguf") as again:
        assert all(np.array_equal(one.raw(name), again.raw(name)) for name in one.tensors)
        assert not any(key.startswith("split.") for key in again.metadata)


def test_a_missing_part_is_named(whole, tmp_path):
    paths = split(whole, tmp_path)
    GGUF.open(paths[0]).close()
    paths[1].rename(tmp_path / "elsewhere.gguf")
    for path in (paths[0], paths[2]):
        with pytest.raises(BadFileError, match=r"model-00002-of-00003.gguf: is missing: the model consists of 3 parts"):
            GGUF.open(path)


def test_a_part_under_another_name(whole, tmp_path):
    paths = split(whole, tmp_path)
    renamed = paths[0].rename(tmp_path / "model.gguf")
    with pytest.raises(BadFileError, match=r"call it NAME-00001-of-00003\.gguf again"):
        GGUF.open(renamed)
    renamed.rename(tmp_path / "other-00002-of-00003.gguf")
    with pytest.raises(BadFileError, match="is part 1 of the 3 of a split model"):
        GGUF.open(tmp_path / "other-00002-of-00003.gguf")


def swapped(paths):
    a, b = paths[1].read_bytes(), paths[2].read_bytes()
    paths[1].write_bytes(b)
    paths[2].write_bytes(a)


def twice(paths):
    paths[2].write_bytes(paths[1].read_bytes())


def cut_off(paths):
    paths[2].write_bytes(paths[2].read_bytes()[:-40])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (swapped, "00002-of-00003.gguf: is not part 2 of 3"),
        (twice, "00003-of-00003.gguf: is not part 3 of 3"),
        (cut_off, "00003-of-00003.gguf: is cut off"),
    ],
)
def test_parts_that_do_not_fit_each_other(whole, tmp_path, damage, message):
    paths = split(whole, tmp_path)
    damage(paths)
    with pytest.raises(BadFileError, match=message):
        GGUF.open(paths[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, w: w.kv_data[0]["split.count"].__setattr__("value", 0), "is part 0 of 0 of a split model"),
        (lambda i, w: w.kv_data[0]["split.count"].__setattr__("value", 60000), "these are not numbers of parts"),
        (lambda i, w: w.kv_data[0]["split.no"].__setattr__("value", 7), "these are not numbers of parts"),
        (lambda i, w: w.kv_data[0]["split.tensors.count"].__setattr__("value", 99), "is of a model of 99 tensors"),
        (
            lambda i, w: i == 2 and w.add_tensor("token_embd.weight", np.ones((4, 4), np.float32)),
            "has the tensor 'token_embd.weight', which an earlier part has already",
        ),
    ],
)
def test_parts_that_lie(whole, tmp_path, change, message):
    paths = split(whole, tmp_path, change=change)
    with pytest.raises(BadFileError, match=message):
        GGUF.open(paths[0])


def test_a_refused_model_leaves_nothing_mapped(whole, tmp_path, monkeypatch):
    paths = split(whole, tmp_path)
    cut_off(paths)
    made, real = [], mmap.mmap

    def noting(*arguments, **options):
        made.append(real(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(mmap, "mmap", noting)
    with pytest.raises(BadFileError):
        GGUF.open(paths[0])
    gc.collect()
    assert len(made) == 1 + N and all(mapped.closed for mapped in made)


def test_a_part_without_the_first_keys_is_no_model(whole, tmp_path):
    """A later part alone, claiming to be the only one."""
    paths = split(whole, tmp_path, change=lambda i, w: i == 1 and w.kv_data[0]["split.count"].__setattr__("value", 1))
    with pytest.raises(BadFileError, match="these are not numbers of parts"):
        GGUF.open(paths[1])


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_llama_cpp_reads_the_same(tmp_path):
    test_llama_cpp = pytest.importorskip("test_llama_cpp")
    trained = test_llama_cpp.Trained(tmp_path, "llama", "ascii")
    write_gguf(tmp_path / "one.gguf", trained.config, trained.parameters, trained.tokenizer)
    first, ids = split(tmp_path / "one.gguf", tmp_path)[0], trained.tokenizer.encode("a = 1")
    loaded = toy.load(first)
    theirs = test_llama_cpp.LlamaCpp(first).log_probabilities(ids, loaded.config.vocab_size)
    assert np.abs(theirs - test_llama_cpp.log_softmax(loaded.logits(ids))).max() <= test_llama_cpp.BAR
