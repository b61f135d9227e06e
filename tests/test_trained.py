"""Opening models that exist: GGUF files, adapters, runs of every recipe, and what is said when one cannot be opened."""

import json
import shutil

import numpy as np
import pytest
from single_thread import single_thread  # noqa: F401 (autouse)

pytest.importorskip("gguf", reason="quantised files need the gguf package")
pytest.importorskip("tokenizers", reason="the tokenizers library is not installed (pip install tokenizers)")
pytest.importorskip("jinja2", reason="jinja2 is not installed (pip install jinja2)")

import model_files
from bit_fit import BitFitOptions, BitFitStart
from model_files import ALPHA, CONTEXT, RANK

from toy.data import ByteTokenizer, tokenizer_from_json
from toy.data.gguf_tokenizer import GGUFTokenizer
from toy.engines import model_from
from toy.files import BadFileError, read_checkpoint, write_checkpoint
from toy.files.gguf import GGUF
from toy.quantized import QuantizedMatrix
from toy.trained.export import merge_adapters
from toy.trained.load import chat_prompt, load_trained, read_trained, text_ids
from toy.training import (
    RECIPES,
    FromScratchOptions,
    FullFinetuneOptions,
    LoRAOptions,
    Training,
    WarmStartOptions,
)

IDS = np.array([5, 77, 200, 3, 41, 9])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return model_files.write_files(tmp_path_factory.mktemp("models"))


def dense_logits(path, adapters=None, scale=1.0):
    """The logits of IDS by a float32 copy of the model, adapters merged in."""
    with GGUF.open(path) as gguf:
        parameters, config = gguf.parameters(), gguf.config()
    return model_from(config, merge_adapters(parameters, adapters or {}, scale), "numpy").forward(IDS)[0]


def assert_close(logits, wanted):
    assert wanted.std() > 0.5  # not a model that predicts nothing, with which anything would agree
    np.testing.assert_allclose(logits, wanted, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_gguf_file_loads_as_its_model_and_tokenizer(files, name, backend):
    trained = load_trained(files / f"{name}.gguf", backend=backend.name)
    assert trained.step is None
    assert trained.tokenizer.decode(trained.tokenizer.encode("hello 12")) == "hello 12"
    assert_close(trained.model.forward(IDS)[0], dense_logits(files / f"{name}.gguf"))


def test_the_matrices_of_a_file_stay_in_their_type_where_there_are_kernels(files, kernels):
    for backend, kind in (("cython", QuantizedMatrix), ("ggml", QuantizedMatrix), ("numpy", np.ndarray)):
        parameters = load_trained(files / "llama.gguf", backend=backend).model.parameters
        assert isinstance(parameters.blk[1].ffn_gate.weight, kind), backend
        assert isinstance(parameters.token_embd.weight, kind), backend


def test_an_adapter_joins_the_model(files, backend):
    trained = load_trained(files / "llama.gguf", files / "adapter.gguf", backend.name)
    assert trained.model.lora_scale == ALPHA / RANK
    wanted = dense_logits(files / "llama.gguf", model_files.adapters(), ALPHA / RANK)
    assert_close(trained.model.forward(IDS)[0], wanted)
    assert np.abs(wanted - dense_logits(files / "llama.gguf")).max() > 0.1


def test_a_model_by_name(files, tmp_path, monkeypatch):
    from toy.files import places

    monkeypatch.setenv("TOY_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="type `toy fetch smollm2-135m`"):
        load_trained("smollm2-135m")
    with pytest.raises(FileNotFoundError, match="no model of that name"):
        load_trained("smollm3")
    monkeypatch.setattr(places, "cached", lambda name: files / "llama.gguf")
    assert load_trained("smollm2-135m").model.arch == "llama"


@pytest.mark.parametrize(
    ("model", "adapter", "error", "message"),
    [
        ("damaged.gguf", None, BadFileError, r"damaged\.gguf.*is cut off"),
        ("adapter.gguf", None, ValueError, "is not a model: its general.type is 'adapter'"),
        ("mute.gguf", None, ValueError, r"mute\.gguf has no tokenizer"),
        ("llama.gguf", "other.gguf", ValueError, r"other\.gguf is an adapter for another base"),
        ("gpt2.gguf", "adapter.gguf", ValueError, "it is for a llama model, not gpt2"),
        ("llama.gguf", "gpt2.gguf", ValueError, r"gpt2\.gguf is not a LoRA adapter"),
        ("llama.gguf", "damaged.gguf", BadFileError, r"damaged\.gguf"),
        ("llama.gguf", "nowhere.gguf", FileNotFoundError, r"nowhere\.gguf"),
    ],
)
def test_what_does_not_serve_is_named(files, model, adapter, error, message):
    with pytest.raises(error, match=message):
        load_trained(files / model, None if adapter is None else files / adapter)


def test_a_file_of_another_architecture_is_named(files, tmp_path):
    data = (files / "llama.gguf").read_bytes()
    (tmp_path / "model").write_bytes(data.replace(b"llama", b"lamal"))  # no suffix: the first bytes tell what it is
    with pytest.raises(ValueError, match="architecture 'lamal'; this library has llama and gpt2"):
        load_trained(tmp_path / "model")


def test_reading_for_an_export_needs_no_tokenizer(files):
    stored = read_trained(files / "mute.gguf")
    assert stored.tokenizer is None and stored.name == "Small" and stored.arch == "llama" and not stored.adapters


# -- runs that begin with a model --------------------------------------------------------------------------------------


@pytest.fixture
def run(files, tmp_path, monkeypatch):
    """Trains for some steps on a copy of the llama -> the Training and its directory."""
    monkeypatch.setattr(Training, "_draw", lambda training: None)
    shutil.copy(files / "llama.gguf", tmp_path / "base.gguf")
    (tmp_path / "text.txt").write_text("hello 12 hello, hello. " * 60)

    def run(kind, **options):
        common = {
            "corpus": str(tmp_path / "text.txt"),
            "batch": 2,
            "context": 8,
            "steps": 3,
            "eval_batches": 1,
            "lr": 0.05,
        }
        model = {} if kind is FromScratchOptions else {"model": str(tmp_path / "base.gguf")}
        training = Training(kind(**{**common, **model, **options}), out=tmp_path / "run")
        for _ in training.run():
            pass
        return training, tmp_path / "run"

    return run


def logits(model):
    return model.forward(IDS)[0]


def checkpoint_of(folder):
    return folder / "weights" / (folder / "weights" / "latest").read_text().strip()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (LoRAOptions, {"rank": 3, "alpha": 12.0, "targets": ("q", "down")}),
        (FullFinetuneOptions, {}),
        (WarmStartOptions, {"d_model": 32, "heads": 4, "layers": 1}),
        (WarmStartOptions, {"lens": True, "d_model": 16, "heads": 2, "layers": 1, "context": 8}),
    ],
    ids=["lora", "full-finetune", "warm-start", "lens"],
)
def test_a_run_that_began_with_a_model_loads_as_what_was_trained(run, backend, kind, options):
    training, folder = run(kind, backend=backend.name, device=backend.device, **options)
    for path in (folder, checkpoint_of(folder)):
        trained = load_trained(path, backend=backend.name)
        assert trained.step == 3
        assert_close(logits(trained.model), logits(training.model()))
        assert isinstance(trained.tokenizer, GGUFTokenizer)


def test_the_base_of_a_lora_run_may_move_when_the_run_is_told(run, tmp_path):
    _, folder = run(LoRAOptions)
    before = logits(load_trained(folder).model)
    (tmp_path / "base.gguf").rename(tmp_path / "moved.gguf")
    with pytest.raises(FileNotFoundError, match=r"is not there any more: put .*base\.gguf back, or write its new path"):
        load_trained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["base"]["path"] = str(tmp_path / "moved.gguf")
    (folder / "config.json").write_text(json.dumps(config))
    np.testing.assert_array_equal(logits(load_trained(folder).model), before)


def test_a_lora_run_on_a_base_that_changed_is_refused(run, files, tmp_path):
    _, folder = run(LoRAOptions)
    model_files.write_model(tmp_path / "base.gguf", seed=1, tokenizer=model_files.tokenizer())
    with pytest.raises(BadFileError, match=r"is not the base model that .* was trained on"):
        load_trained(folder)
    (tmp_path / "base.gguf").unlink()  # not overwritten in place: it may still be mapped
    shutil.copy(files / "gpt2.gguf", tmp_path / "base.gguf")
    with pytest.raises(BadFileError, match=r"is not the base model that .* was trained on"):
        load_trained(folder)


def test_a_lora_run_takes_no_second_adapter(run, files):
    _, folder = run(LoRAOptions)
    with pytest.raises(ValueError, match="has an adapter of its own already"):
        load_trained(folder, files / "adapter.gguf")


def test_the_adapter_beside_a_lora_checkpoint_is_the_same(run, tmp_path):
    training, folder = run(LoRAOptions)
    trained = load_trained(tmp_path / "base.gguf", checkpoint_of(folder).with_suffix(".gguf"))
    assert_close(logits(trained.model), logits(training.model()))


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.pop("base"),
        lambda config: config.update(base={"path": 3, "digest": ""}),
        lambda config: config["base"].pop("digest"),
        lambda config: config.pop("lora"),
        lambda config: config["lora"].update(alpha=-1.0),
        lambda config: config["lora"].update(alpha="much"),
        lambda config: config["lora"].update(rank=99),
        lambda config: config["model"].update(n_layers=1),
        lambda config: config.update(model=None),
    ],
)
def test_a_lora_checkpoint_whose_config_does_not_fit_is_refused(run, change):
    _, folder = run(LoRAOptions)
    path = checkpoint_of(folder)
    checkpoint = read_checkpoint(path)
    change(checkpoint.config)
    write_checkpoint(path, checkpoint)
    with pytest.raises(BadFileError):
        load_trained(path)


def test_the_tokenizer_of_a_gguf_file_out_of_a_config(run, tmp_path):
    training, folder = run(FullFinetuneOptions)
    again = tokenizer_from_json(training.tokenizer.to_json())
    assert again.encode("hello 12").tolist() == training.tokenizer.encode("hello 12").tolist()
    for wrong in ({"kind": "gguf"}, {"kind": "gguf", "path": 3, "sha256": "x"}, {"kind": "gguf", "path": "x"}):
        with pytest.raises(ValueError, match="not a tokenizer"):
            tokenizer_from_json(wrong)
    (tmp_path / "base.gguf").unlink()
    with pytest.raises(FileNotFoundError, match=r"the tokenizer is in .*base\.gguf, which is not there any more"):
        load_trained(folder)


# -- a recipe that leaves some of the weights in the file it began with -------------------------------------------------


@pytest.fixture
def bit_fit(run, monkeypatch):
    monkeypatch.setitem(RECIPES, "bit-fit", BitFitStart)
    return run(BitFitOptions)


def test_what_a_run_left_in_its_base_is_found_there(bit_fit, tmp_path):
    training, folder = bit_fit
    stored = read_trained(folder)
    assert isinstance(stored.parameters["blk.0.attn_q.weight"], QuantizedMatrix)  # still the file's own
    assert "blk.0.attn_q.weight" not in read_checkpoint(checkpoint_of(folder)).parameters
    for path in (folder, checkpoint_of(folder), checkpoint_of(folder).with_suffix(".gguf")):
        assert_close(logits(load_trained(path).model), logits(training.model()))
    assert np.abs(logits(training.model()) - logits(load_trained(tmp_path / "base.gguf").model)).max() > 0.1


def test_a_run_resumes_on_its_base(bit_fit):
    _, folder = bit_fit
    again = Training.resume(folder, steps=5)
    assert again.step == 3
    for _ in again.run():
        pass
    assert load_trained(folder).step == 5


@pytest.mark.parametrize("change", ["other weights", "another model", "a tensor less"])
def test_a_base_that_changed_is_refused(bit_fit, files, tmp_path, change):
    _, folder = bit_fit
    read_trained(folder)
    if change == "other weights":
        (tmp_path / "base.gguf").unlink()  # not overwritten in place: it may still be mapped
        model_files.write_model(tmp_path / "base.gguf", seed=1, tokenizer=model_files.tokenizer())
    elif change == "another model":
        (tmp_path / "base.gguf").unlink()
        shutil.copy(files / "gpt2.gguf", tmp_path / "base.gguf")
    else:
        checkpoint = read_checkpoint(path := checkpoint_of(folder))
        del checkpoint.parameters["output_norm.weight"], checkpoint.moments["m"]["output_norm.weight"]
        del checkpoint.moments["v"]["output_norm.weight"]
        write_checkpoint(path, checkpoint)
    with pytest.raises(BadFileError, match=r"base\.gguf: is not the base model that .* was trained on"):
        read_trained(folder)


def test_a_base_that_is_gone_is_asked_for(bit_fit, tmp_path):
    _, folder = bit_fit
    (tmp_path / "base.gguf").rename(tmp_path / "moved.gguf")
    with pytest.raises(FileNotFoundError, match=r"is not there any more"):
        read_trained(folder)


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_a_text_begins_as_the_model_wants_it():
    with_bos = model_files.tokenizer(**{"tokenizer.ggml.add_bos_token": True})
    plain = with_bos.encode("hello").tolist()
    assert text_ids(with_bos, "hello").tolist() == [with_bos.bos_id, *plain]
    assert text_ids(with_bos, "").tolist() == [with_bos.bos_id]
    assert text_ids(model_files.tokenizer(), "hello").tolist() == plain
    assert text_ids(ByteTokenizer(), "ab").tolist() == [97, 98]


def test_a_chat_prompt_is_the_template_with_its_special_tokens():
    tokenizer = model_files.tokenizer()
    wanted = tokenizer.encode("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", parse_special=True).tolist()
    assert chat_prompt(tokenizer, "hello", 100).tolist() == wanted
    assert wanted[0] == tokenizer.bos_id
    with_bos = model_files.tokenizer(**{"tokenizer.ggml.add_bos_token": True})
    assert chat_prompt(with_bos, "hello", 100).tolist() == wanted  # the template has written it already
    eos_first = model_files.tokenizer(**{"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 0})
    assert chat_prompt(eos_first, "hello", 100).tolist() == [0, *wanted]


def test_a_chat_that_cannot_be_is_refused():
    for tokenizer in (ByteTokenizer(), model_files.tokenizer(**{"tokenizer.chat_template": None})):
        with pytest.raises(ValueError, match="no chat template"):
            chat_prompt(tokenizer, "hello", 100)
    with pytest.raises(ValueError, match=f"the model's context is {CONTEXT}: shorten it"):
        chat_prompt(model_files.tokenizer(), "long " * CONTEXT, CONTEXT)
