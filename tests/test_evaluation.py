"""toy.trained.evaluate: the log-probability of every token, against plain computations."""

import math
from itertools import pairwise

import numpy as np
import pytest
from single_thread import single_thread  # noqa: F401 (autouse)

import toy
from toy.checks import gradcheck
from toy.data import ByteTokenizer, CharTokenizer
from toy.data.tokenizers import UnknownCharacterError
from toy.models import model_for
from toy.ops import reference
from toy.trained import evaluate as evaluation
from toy.trained.evaluate import (
    TextEvaluator,
    evaluate_text,
    log_probability_of,
    skipped_in_words,
    token_bytes,
    window_ends,
)

CONTEXT = 12
SIZES = dict(vocab_size=256, d_model=16, n_heads=2, d_ff=32, n_layers=2, context_length=CONTEXT)
CONFIGS = {
    "transformer": toy.TransformerConfig(**SIZES),
    "gpt2": toy.GPT2Config(**SIZES),
    "llama": toy.LlamaConfig(**SIZES, n_kv_heads=1),
}
TEXT = "How far is it? Über 3 €, and then some more of it, and more."
IDS = ByteTokenizer().encode(TEXT)


def make_model(arch, ops=reference):
    model = model_for(CONFIGS[arch]).from_config(CONFIGS[arch], ops=ops)
    gradcheck.random_parameters(model.parameters, np.random.default_rng(0))
    return model


def plain(model, ids, context, stride):
    """One token at a time, each with a forward of its own over the window that is to predict it."""
    log_probabilities, end = [], min(context, len(ids) - 1)
    for i in range(1, len(ids)):
        if i > end:
            end = min(end + stride, len(ids) - 1)
        logits = model.forward(ids[max(0, end - context) : i])[0][-1].astype(np.float64)
        log_probabilities.append(logits[ids[i]] - logits.max() - np.log(np.exp(logits - logits.max()).sum()))
    return np.array(log_probabilities)


@pytest.mark.parametrize("arch", CONFIGS)
@pytest.mark.parametrize(("context", "stride"), [(12, 12), (12, 6), (12, 1), (8, 5), (1, 1)])
def test_every_token_is_predicted_once_after_the_tokens_of_its_window(ops, arch, context, stride):
    model = make_model(arch, ops)
    result = evaluate_text(model, ByteTokenizer(), TEXT, context, stride)
    wanted = plain(model, IDS, context, stride)
    assert wanted.std() > 0.5
    np.testing.assert_allclose(result.log_probabilities, wanted, atol=1e-4)
    assert result.token_ids.tolist() == IDS[1:].tolist()
    assert result.loss == pytest.approx(-wanted.mean(), rel=1e-4)
    assert result.perplexity == pytest.approx(math.exp(-wanted.mean()), rel=1e-3)
    assert result.bits_per_byte == pytest.approx(-wanted.sum() / math.log(2) / (len(TEXT.encode()) - 1), rel=1e-4)


def test_against_torch(torch_models):
    import torch

    model = make_model("gpt2")
    logits = torch.tensor(model.forward(IDS[:CONTEXT])[0]).double()
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(IDS[1 : CONTEXT + 1]).long(), reduction="none")
    result = evaluate_text(model, ByteTokenizer(), TEXT, limit=CONTEXT + 1)
    np.testing.assert_allclose(-result.log_probabilities, losses.numpy(), atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 11, 12, 13, 100])
@pytest.mark.parametrize(("context", "stride"), [(12, 12), (12, 5), (12, 1)])
def test_the_windows_cover_the_text_and_leave_enough_context(n, context, stride):
    ends = window_ends(n, context, stride)
    assert ends[-1] == n and all(later > end for end, later in pairwise(ends))
    for end, later in pairwise(ends):  # predicts end + 1 ... later, reads from later - context
        assert later - end <= stride
        assert end + 1 - (later - context) > context - stride


def test_how_the_windows_are_batched_changes_nothing(ops, monkeypatch):
    model, text = make_model("llama", ops), TEXT * 20
    whole = evaluate_text(model, ByteTokenizer(), text).log_probabilities
    for name, value in (("_ROWS", 1), ("_ROWS", 40), ("_LOGITS", 1), ("_LOGITS", 256 * 5)):
        with monkeypatch.context() as changed:
            changed.setattr(evaluation, name, value)
            again = evaluate_text(model, ByteTokenizer(), text).log_probabilities
        np.testing.assert_allclose(again, whole, atol=1e-4)


def test_the_logits_of_a_large_vocabulary_are_made_in_parts(monkeypatch):
    model, most = make_model("llama"), []
    monkeypatch.setattr(evaluation, "_LOGITS", 256 * 7)
    unembed = model.unembed_rows
    monkeypatch.setattr(model, "unembed_rows", lambda x: (most.append(len(x)), unembed(x))[1], raising=False)
    evaluate_text(model, ByteTokenizer(), TEXT, stride=3)
    assert max(most) == 7 and sum(most) == len(IDS) - 1  # and no row is unembedded that is not scored


def test_the_loss_of_a_run_on_the_windows_of_its_own_evaluation(tmp_path, backend):
    """Side by side and without a rest they are the same windows."""
    recipe = toy.recipes.FromScratch(*backend)
    recipe.realize(CONFIGS["gpt2"], toy.RecipeOptions(t_seq=CONTEXT, t_batch=4, seed=1, init_scale=8.0))
    ids = IDS[: 4 * CONTEXT + 1]
    wanted = recipe.evaluate(ids[:-1].reshape(4, CONTEXT), ids[1:].reshape(4, CONTEXT))
    model = toy.engines.model_from(CONFIGS["gpt2"], recipe.parameters(), backend.name)
    result = evaluate_text(model, ByteTokenizer(), TEXT, stride=CONTEXT, limit=len(ids))
    assert result.loss == pytest.approx(wanted, abs=1e-4)
    assert abs(wanted - math.log(256)) > 0.05


def test_defaults_limit_and_progress():
    model = make_model("llama")
    evaluator = TextEvaluator(model, ByteTokenizer(), TEXT, limit=40)
    assert (evaluator.context, evaluator.stride, evaluator.n_tokens) == (CONTEXT, CONTEXT // 2, 39)
    assert list(evaluator)[-1] == 39
    np.testing.assert_allclose(evaluator.result().log_probabilities, plain(model, IDS[:40], 12, 6), atol=1e-4)
    short = evaluate_text(model, ByteTokenizer(), "ab", limit=9)
    np.testing.assert_allclose(short.log_probabilities, plain(model, np.array([97, 98]), 12, 6), atol=1e-5)


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("", {}, "the text has no tokens: there is nothing to predict"),
        ("a", {}, "the text has one token"),
        (TEXT, {"limit": 1}, "limit must be at least 2"),
        (TEXT, {"context": 13}, "context must lie between 1 and the model's 12, got 13"),
        (TEXT, {"context": 0}, "got 0"),
        (TEXT, {"stride": 13}, "stride must lie between 1 and the context of 12"),
        (TEXT, {"context": 4, "stride": 0}, "the context of 4, got 0"),
    ],
)
def test_bad_settings_are_refused(text, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate_text(make_model("llama"), ByteTokenizer(), text, **settings)


def test_numbers_that_are_not_finite_are_told():
    model = make_model("gpt2")
    model.parameters.output_norm.weight[0] = np.nan
    with pytest.raises(RuntimeError, match="not finite"):
        evaluate_text(model, ByteTokenizer(), TEXT)


def test_large_logits_do_not_overflow():
    logits = np.array([[1e4, -1e4, 0.0], [3.0, 3.0, 3.0]], np.float32)
    np.testing.assert_allclose(log_probability_of(logits, np.array([1, 2])), [-2e4, -math.log(3)])


def test_bytes_of_tokens_add_up_to_the_text():
    for tokenizer in (ByteTokenizer(), CharTokenizer.from_text(TEXT)):
        assert b"".join(token_bytes(tokenizer, i) for i in tokenizer.encode(TEXT).tolist()) == TEXT.encode()


# -- like llama.cpp's program ------------------------------------------------------------------------------------------


class Begun(ByteTokenizer):
    """Bytes, and a model that wants the byte 7 at the beginning."""

    add_bos, bos_id = True, 7


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), Begun()], ids=["plain", "begun"])
@pytest.mark.parametrize("context", [3, 4, 7, 12])
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_like_llama_perplexity_the_second_half_of_each_window_is_counted(ops, tokenizer, context, end):
    """Written out from the description of the program, one window after the other."""
    model, text = make_model("llama", ops), TEXT + "\n" + TEXT + end
    data = [*([7] if tokenizer.add_bos else []), *text.removesuffix("\n").encode()]
    wanted, counted = [], []
    for chunk in range(len(data) // context):
        window = data[chunk * context : (chunk + 1) * context]
        read = [7, *window[1:]] if tokenizer.add_bos else window
        logits = model.forward(np.array(read))[0].astype(np.float64)
        for i in range(context // 2, context - 1):
            row = logits[i] - logits[i].max()
            wanted.append(row[window[i + 1]] - math.log(np.exp(row).sum()))
            counted.append(window[i + 1])
    result = evaluate_text(model, tokenizer, text, context, like="llama-perplexity")
    np.testing.assert_allclose(result.log_probabilities, wanted, atol=1e-4)
    assert result.token_ids.tolist() == counted and result.n_bytes == len(counted)
    assert len(wanted) == (len(data) // context) * (context - context // 2 - 1)
    mean, square = np.mean(wanted), np.mean(np.square(wanted))
    assert result.perplexity == pytest.approx(math.exp(-mean), rel=1e-3)
    error = math.exp(-mean) * math.sqrt((square - mean**2) / (len(wanted) - 1))
    assert result.perplexity_error == pytest.approx(error, rel=1e-3)


def test_its_progress_and_its_defaults():
    evaluator = TextEvaluator(make_model("llama"), ByteTokenizer(), TEXT, like="llama-perplexity", limit=40)
    assert (evaluator.context, evaluator.stride, evaluator.n_tokens) == (CONTEXT, CONTEXT, 3 * 5)
    assert list(evaluator)[-1] == 15


class Ending(ByteTokenizer):
    add_eos = True


@pytest.mark.parametrize(
    ("tokenizer", "settings", "message"),
    [
        (ByteTokenizer(), {"like": "gpt"}, "like must be one of llama-perplexity, got 'gpt'"),
        (ByteTokenizer(), {"stride": 3}, "windows side by side: leave out the stride of 3"),
        (ByteTokenizer(), {"context": 2}, "must be at least 3 tokens, got 2"),
        (ByteTokenizer(), {"limit": 23}, "a context of 12 needs a text of at least 24 tokens, this one has 23"),
        (Ending(), {}, "puts an end token after every text"),
    ],
)
def test_what_that_program_cannot_do_is_refused(tokenizer, settings, message):
    settings = {"like": "llama-perplexity", **settings}
    evaluate_text(make_model("llama"), ByteTokenizer(), TEXT, like="llama-perplexity", limit=24)
    with pytest.raises(ValueError, match=message):
        evaluate_text(make_model("llama"), tokenizer, TEXT, **settings)


# -- characters without a token ----------------------------------------------------------------------------------------


def test_unknown_characters_are_refused_or_left_out():
    tokenizer, text = CharTokenizer.from_text("abc "), "ab é c\U0001f600aé\nb c"
    config = toy.LlamaConfig(**SIZES | {"vocab_size": 4}, n_kv_heads=1)
    model = model_for(config).from_config(config, ops=reference)
    gradcheck.random_parameters(model.parameters, np.random.default_rng(0))
    with pytest.raises(
        UnknownCharacterError, match=r"'é' .*at offset 3.*: leave such characters out with --unknown skip"
    ):
        evaluate_text(model, tokenizer, text)
    evaluator = TextEvaluator(model, tokenizer, text, unknown="skip")
    assert evaluator.skipped == {"\n": 1, "é": 2, "\U0001f600": 1}
    assert skipped_in_words(evaluator.skipped) == (
        "4 characters that the model has no token for are left out: 'é' (U+00E9) 2 times, '\\n' (U+000A) 1 times, "
        "'\U0001f600' (U+1F600) 1 times"
    )
    list(evaluator)
    kept = evaluate_text(model, tokenizer, "ab  cab c")
    assert np.array_equal(evaluator.result().log_probabilities, kept.log_probabilities)
    assert (evaluator.result().n_skipped, kept.n_skipped, kept.n_bytes) == (4, 0, 8)
    assert evaluate_text(model, tokenizer, "ab ab", unknown="skip").n_skipped == 0
    with pytest.raises(ValueError, match="unknown must be one of error, skip"):
        evaluate_text(model, tokenizer, "ab ab", unknown="ignore")
    with pytest.raises(ValueError, match="the text has no tokens"):
        evaluate_text(model, tokenizer, "éé", unknown="skip")
    assert skipped_in_words(dict.fromkeys("zyxwvuts", 1)).endswith(", and 3 others")
