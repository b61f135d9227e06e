"""The exercises: solutions pass, stubs do not, every planted mistake gets its own hint, and whatever else a function may do
instead of the right thing is told."""

import dataclasses
import functools
import inspect
import itertools
import json
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import toy
from toy.checks import gradcheck
from toy.checks.exercises import LESSONS, TASKS, Mistake, Task, judge_answer
from toy.data import batches, bpe
from toy.models.generation import sample
from toy.models.inputs import ImageBatch
from toy.ops import reference
from toy.training import schedules

ALL = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def verdict(name, function):
    return judge_answer(TASKS[name], function)


# ----------------------------------------------------------------------------------------------------------------------
# every task
# ----------------------------------------------------------------------------------------------------------------------


def test_there_are_tasks_for_every_lesson():
    assert len(TASKS) >= 30
    assert {task.lesson for task in TASKS.values()} == LESSONS.keys() == set(range(10))
    assert sum(len(task.mistakes) for task in TASKS.values()) >= 3 * len(TASKS)


@ALL
def test_the_solution_is_right(task):
    for seed in (0, 1):
        found = judge_answer(task, task.function(), seed)
        assert found.right and found.hint is None, found.text
    assert re.fullmatch(rf"{task.name}: right, in \d cases; the worst error is [\d.e+-]+( \(.*\))?\.", found.text)


@ALL
def test_the_stub_is_told_to_have_blanks(task):
    names = [parameter.name for parameter in inspect.signature(task.function(task.stub)).parameters.values()]
    assert names == list(next(iter(task.cases(np.random.default_rng(0)))))
    assert not re.search(r"[^\[]\.\.\.", task.solution) and "#?" not in task.solution + task.stub
    found = judge_answer(task, task.function(task.stub))
    assert not found and found.hint is None
    line = next(i for i, line in enumerate(task.stub.splitlines(), 1) if re.search(r"\.\.\.( |$)", line))
    assert f"There is still a blank (...) to fill in, in line {line} of the function" in found.text.replace(
        "\n    ", " "
    )


def half_written(task):
    """The stubs in which one blank alone is left."""
    lines = zip(task.solution.splitlines(), task.stub.splitlines())
    blanks = [i for i, (solution, stub) in enumerate(lines) if solution != stub]
    for i in blanks:
        lines = task.solution.splitlines()
        lines[i] = task.stub.splitlines()[i]
        yield "\n".join(lines)


@ALL
def test_one_blank_that_is_left_is_found(task):
    for source in half_written(task):
        found = judge_answer(task, task.function(source))
        assert not found and "still a blank" in found.text, f"{source}\n{found.text}"


# what a report on a wrong answer says of it, besides the hint: shape and first element, or what else is wrong where
EXACT = re.compile(
    r"shape \([\d, ]*\), is wrong in \d+ of \d+ elements. The first: [\w.\[\]]+\[[\d, ]+\] is \S+, expected \S+\."
    r"|has shape \([\d, ]*\), expected \([\d, ]*\)"
    r"|\w+ is \S+, expected \S+\."  # a number
    r"|It raises \w+ in line \d+ of the function: `[^`]+`. Python says: "
    r"|It changes its input \w+, shape \([\d, ]*\): \w+\[[\d, ]+\] was \S+ and is now \S+\."
    r"|has dtype \w+, expected \w+"
)


@ALL
def test_every_planted_mistake_gets_its_own_hint(task):
    hints = [mistake.hint for mistake in task.mistakes]
    assert len(set(hints)) == len(hints) >= 3
    for mistake in task.mistakes:
        found = judge_answer(task, task.function(task.wrong_source(mistake)))
        assert not found.right, mistake
        assert found.hint == mistake.hint, f"{mistake}\n{found.text}"
        flat = " ".join(found.text.split())
        assert EXACT.search(flat), found.text
        assert re.search(r"Case \d of \d: \w", flat) and f"Hint: {mistake.hint}" in flat
        assert max(map(len, found.text.splitlines())) <= 80, found.text


@ALL
def test_no_two_mistakes_of_a_task_are_one(task):
    """With other inputs too: no mistake gets another one's hint."""
    for mistake in task.mistakes:
        found = judge_answer(task, task.function(task.wrong_source(mistake)), seed=7)
        assert found.hint == mistake.hint, f"{mistake}\n{found.text}"


def test_a_planted_mistake_that_is_none_would_be_found():
    with pytest.raises(ValueError, match=r"task linear: the solution has 'x @ weight.T' 1 times|has 'gone' 0 times"):
        TASKS["linear"].wrong_source(Mistake("gone", "", ""))
    harmless = Mistake("x @ weight.T + bias", "bias + x @ weight.T", "")
    assert verdict("linear", TASKS["linear"].function(TASKS["linear"].wrong_source(harmless)))


# ----------------------------------------------------------------------------------------------------------------------
# what is right: compared with the rest of the library
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        f"{op}_backward"
        for op in ("embedding", "linear", "cross_entropy", "rms_norm", "layer_norm", "gelu", "silu", "swiglu", "rope")
    ],
)
def test_the_functions_of_the_reference_are_right_answers(name):
    assert (found := verdict(name, getattr(reference, name))), found.text


@pytest.mark.parametrize("name", ["linear", "embedding", "rms_norm", "layer_norm", "gelu", "silu", "swiglu", "rope"])
def test_the_forwards_of_the_reference_are_right_without_their_cache(name):
    op = getattr(reference, name)
    assert (found := verdict(name, lambda *arguments: op(*arguments)[0])), found.text
    assert "expected an array" in verdict(name, op).text


class Draws:
    """Takes the place of a random generator and keeps the probabilities that were to be drawn from."""

    def choice(self, n, p):
        self.probabilities = p
        return 0


@pytest.mark.parametrize("setting", ["top_k", "top_p"])
def test_sampling_is_as_in_generation(setting):
    def answer(logits, number):
        draws = Draws()
        sample(logits, draws, **{setting: number})
        return draws.probabilities

    assert (found := verdict(setting, answer)), found.text


def q8_0(x):
    raw = toy.quantized.quantize(x[None].astype(np.float32), "Q8_0")[0]
    return float(raw[:2].copy().view("<f2")[0]), raw[2:].view(np.int8)


def test_a_block_is_quantised_as_in_a_file():
    pytest.importorskip("gguf")
    task = TASKS["quantise_q8_0"]
    for case in task.cases(np.random.default_rng(0)):
        (scale, integers), (ours, our_integers) = q8_0(case["x"]), task.function()(case["x"])
        assert abs(scale - ours) <= 2**-10 * ours and np.array_equal(integers, our_integers)  # a float of 16 bits


def test_a_block_is_read_as_from_a_file():
    pytest.importorskip("gguf")

    def answer(raw):
        out = np.empty((1, len(raw) // 34 * 32), np.float32)
        toy.quantized.dequantize(raw[None], "Q8_0", out)
        return out[0].astype(np.float64)

    assert (found := judge_answer(dataclasses.replace(TASKS["dequantise_q8_0"], bar=1e-6), answer)), found.text


def patches(images, p):
    side, channels = images.shape[2:]
    config = toy.ViTConfig(side, channels, p, d_model=4, n_heads=1, d_ff=4, n_layers=1, n_classes=2)
    found = ImageBatch(config, len(images), config.n_tokens).check(images)["patches"]
    return found.reshape(len(images), -1, found.shape[1]).astype(np.float64)


def adamw_row(step, lr, beta1, beta2, eps, weight_decay):
    return toy.AdamW.bias_corrected(lr, beta1, beta2, eps, weight_decay).hp(step)[0].astype(np.float64)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("batch_windows", lambda ids, starts, context: tuple(batches._windows(ids, starts, context))),
        ("learning_rate", schedules.cosine),
        ("merge_pair", bpe.merge),
        ("error_of_max", gradcheck.error_of_max),
        ("patches", patches),
        ("adamw_row", adamw_row),
    ],
)
def test_the_library_gives_right_answers(name, answer):
    task = dataclasses.replace(TASKS[name], bar=1e-6)  # some of them compute in float32
    assert (found := judge_answer(task, answer)), found.text


def test_the_cache_gives_the_last_row_of_the_whole_attention():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 2, 5, 3)) for _ in range(3))
    whole = TASKS["causal_attention"].function()(q, k, v)[0]  # (H, T, d_head)
    keys, values, step = np.empty((7, 2, 3)), np.empty((7, 2, 3)), TASKS["kv_cache_step"].function()
    for n in range(5):
        assert np.allclose(step(q[0, :, n], k[0, :, n], v[0, :, n], keys, values, n), whole[:, n])


def test_the_slope_of_the_bigram_is_that_of_its_loss():
    loss = TASKS["bigram_loss"].function()
    rng = np.random.default_rng(0)
    logits, ids = rng.normal(size=(4, 4)), rng.integers(0, 4, 9)
    measured = gradcheck.central_difference(lambda table: loss(table, ids), logits, 1.0)
    assert np.allclose(TASKS["bigram_slope"].function()(logits, ids), measured, atol=1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# wrong answers of other kinds
# ----------------------------------------------------------------------------------------------------------------------


def corrupted(task, which_call, pick, how):
    """The solution, but in one of its calls one element of what it returns or changes is another one."""
    solution, calls = task.function(), itertools.count()

    def answer(*arguments):
        returned = solution(*arguments)
        if next(calls) != which_call:
            return returned
        outputs = list(returned) if len(task.returns) > 1 else [returned] * len(task.returns)
        names = list(inspect.signature(solution).parameters)
        changed = [arguments[names.index(name)] for name in task.changes]
        changed = [array for item in changed for array in (item if isinstance(item, list) else [item])]
        k = pick % (len(outputs) + len(changed))
        array = np.array(outputs[k]) if k < len(outputs) else changed[k - len(outputs)]
        place = np.unravel_index(pick // 7 % array.size, array.shape)
        array[place] = how(array[place], array)
        if k < len(outputs):
            whole = isinstance(outputs[k], list)
            outputs[k] = array.tolist() if whole else array if array.ndim else array[()]
        return tuple(outputs) if len(task.returns) > 1 else outputs[0] if outputs else None

    return answer


CORRUPTIONS = {
    "a little more": lambda x, array: x + (1 if array.dtype.kind in "iu" else 1e-5 * np.abs(array).max() + 1e-12),
    "the other sign": lambda x, array: -x if x else x + 1,
    "twice as much": lambda x, array: 2 * x if x else x + 1,
    "not a number": lambda x, array: x + 1 if array.dtype.kind in "iu" else np.nan,
}


@given(
    st.sampled_from(sorted(TASKS)), st.sampled_from(sorted(CORRUPTIONS)), st.integers(0, 2), st.integers(0, 10**6)
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def corruptions_do_not_pass(name, how, which_call, pick):
    task = TASKS[name]
    n_cases = len(list(task.cases(np.random.default_rng(0))))
    found = judge_answer(task, corrupted(task, which_call % n_cases, pick, CORRUPTIONS[how]))
    assert not found.right, found.text
    assert EXACT.search(" ".join(found.text.split())), found.text


def test_a_hundred_corruptions_of_right_answers_do_not_pass():
    from hypothesis import HealthCheck, settings

    settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))(corruptions_do_not_pass)()
    task = TASKS["lora_backward"]
    assert judge_answer(
        task, corrupted(task, 99, 0, CORRUPTIONS["not a number"])
    )  # the call that is changed never comes


def raises(x, weight, bias):
    rows = x @ weight.T
    return rows + undefined  # noqa: F821


def of_an_input(x, weight, bias):
    x *= 2
    return x / 2 @ weight.T + bias


def prints(x, weight, bias):
    print("the result is", x.shape)


def leaves(x, weight, bias):
    sys.exit("bye")


def not_written(x, weight, bias):
    raise NotImplementedError


def deep(x, weight, bias):
    return deep(x, weight, bias)


def right(x, weight, bias):
    return x @ weight.T + bias


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda x, weight, bias: None,
         "It returns None, expected an array of shape (5, 3): the last line must be a `return`."),
        (prints, "must be a `return`. Case 1 of 3: x (5, 4), weight (3, 4), bias (3,). It printed: the result is (5, 4)"),
        (raises, "It raises NameError in line LINE of test_exercises.py: `return rows + undefined  # noqa: F821`. "
                 "Python says: name 'undefined' is not defined."),
        (of_an_input, "It changes its input x, shape (5, 4): x[0, 0] was "),
        (leaves, "It ends the whole program (exit) in line LINE of test_exercises.py: `sys.exit(\"bye\")`. Return a value."),
        (not_written, "It is not written yet in line LINE of test_exercises.py: `raise NotImplementedError`."),
        (deep, "It raises RecursionError in line LINE of test_exercises.py"),
        (lambda x, weight, bias: right(x, weight, bias)[:-1], "y has shape (4, 3), expected (5, 3)."),
        (lambda x, weight, bias: right(x, weight, bias)[None], "y has shape (1, 5, 3), expected (5, 3)."),
        (lambda x, weight, bias: right(x, weight, bias).astype("f4"),
         "y has dtype float32, expected float64: the arithmetic is done in the dtype of the inputs."),
        (lambda x, weight, bias: right(x, weight, bias) + 0j, "y has dtype complex128, expected float64"),
        (lambda x, weight, bias: right(x, weight, bias).tolist(), "y is a list of 5, expected an array of shape (5, 3)."),
        (lambda x, weight, bias: (right(x, weight, bias), x), "y is a tuple of 2, expected an array of shape (5, 3)."),
        (lambda x, weight, bias: "right", "y is a str, expected an array of shape (5, 3)."),
        (lambda x, weight, bias: right(x, weight, bias) / 0, "15 of its elements are not finite"),
        (lambda x, weight, bias: -3 * right(x, weight, bias),
         "Every element is -3 times the expected: a factor is missing or one too many."),
        (lambda x, weight, bias: -right(x, weight, bias), "Every element is -1 times the expected: the sign is wrong."),
        (lambda x, weight, bias: ..., "There is still a blank (...)|y is a blank (...), expected"),
        (lambda x, weight: x, "It cannot be called with 3 arguments (too many positional arguments). "
         "The signature is linear(x, weight, bias) -> y."),
        (lambda: 1, "It cannot be called with 3 arguments"),
        (5, "the number|5 is no function: give the function itself, without parentheses or arguments."),
        (np.zeros(3), "an array of shape (3,) is no function"),
        (None, "None is no function"),
    ],
)  # fmt: skip
def test_wrong_answers_are_told(answer, words):
    assert (found := verdict("linear", right)), found.text  # the same function, right
    found = verdict("linear", answer)
    assert not found and found.hint is None
    if "LINE" in words:
        lines, start = inspect.getsourcelines(answer)
        words = words.replace("LINE", str(start + len(lines) - 1))
    text = " ".join(found.text.split())
    assert any(" ".join(option.split()) in text for option in words.split("|")), found.text
    assert "engine.py" not in text and "Traceback" not in text


def test_gradients_that_are_no_sum_are_told():
    def answer(d_y, cache, d_weight, d_bias):
        d_bias += d_y.sum(axis=0)
        return d_y @ cache.weight

    text = " ".join(verdict("linear_backward", answer).text.split())
    assert "d_weight was not changed at all: write into it (d_weight += ...; `a = a + b` makes a new array)." in text

    def loses(d_y, cache, d_weight, d_bias):
        d_weight += d_y.T @ cache.x
        d_bias[:] = d_y.sum(axis=0)
        return d_y @ cache.weight

    assert "What d_bias held is lost: add to it (+=)." in " ".join(verdict("linear_backward", loses).text.split())

    def of_the_cache(d_y, cache, d_weight, d_bias):
        found = reference.linear_backward(d_y, cache, d_weight, d_bias)
        cache.x[...] = 0
        return found

    assert (
        "It changes its input cache.x, shape (5, 4): cache.x[0, 0] was" in verdict("linear_backward", of_the_cache).text
    )


def test_of_several_outputs_the_wrong_ones_are_named():
    def answer(d_out, q, k, v, probabilities):
        d_q, d_k, d_v = TASKS["attention_backward"].function()(d_out, q, k, v, probabilities)
        d_v[0, 0, 1, 2] += 1
        return d_q, d_k, d_v

    found = verdict("attention_backward", answer)
    assert "d_v, shape (2, 2, 3, 4), is wrong in 1 of 48 elements." in found.text
    assert re.search(r"The first:\s+d_v\[0, 0, 1, 2\] is ", found.text) and "d_q[" not in found.text
    assert "It returns None, expected 3 values, d_q, d_k, d_v" in verdict("attention_backward", lambda *_: None).text
    assert "It returns a tuple of 2, expected 3 values" in verdict("attention_backward", lambda *_: (1, 2)).text


def test_two_mistakes_at_once_get_a_hint_each_in_turn():
    """Wrong in two outputs: the hint is of the first, by what it gives there."""
    task = TASKS["attention_backward"]
    by_old = {mistake.old: mistake for mistake in task.mistakes}
    d_k, d_v = by_old["d_scores.swapaxes(2, 3) @ q"], by_old["probabilities.swapaxes(2, 3) @ d_out"]
    source = task.wrong_source(d_k).replace(d_v.old, d_v.new)
    found = judge_answer(task, task.function(source))
    assert found.hint == d_k.hint and "Also wrong: d_v." in found.text


def test_the_first_wrong_element_is_where_it_is_said():
    def answer(scores):
        found = TASKS["softmax"].function()(scores)
        found[-1, 1:3] = 0.25
        return found

    case = next(iter(TASKS["softmax"].cases(np.random.default_rng([0, *b"softmax"]))))
    expected = TASKS["softmax"].function()(**case)
    text = " ".join(verdict("softmax", answer).text.split())
    assert (
        f"is wrong in 2 of 20 elements. The first: probabilities[3, 1] is 0.25, expected {expected[3, 1]:.6g}." in text
    )


def test_a_right_answer_may_print():
    def answer(x, weight, bias):
        print(x.shape)
        return right(x, weight, bias)

    found = verdict("linear", answer)
    assert found and found.text.endswith("\n  It printed: (5, 4)") and len(found.text.splitlines()) == 2


def test_other_kinds_of_functions_are_taken():
    class Layer:
        def __call__(self, x, weight, bias):
            return right(x, weight, bias)

    assert verdict("linear", Layer())
    assert verdict("linear", functools.partial(right))
    assert verdict("perplexity", lambda losses: float(np.exp(losses.mean())))  # a number of Python's


def test_a_loop_without_end_is_left_with_ctrl_c(monkeypatch):
    monkeypatch.setattr(signal, "SIGINT", signal.SIGINT)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:

        def answer(scores):
            while True:
                signal.raise_signal(signal.SIGINT)

        found = verdict("softmax", answer)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not found and found.stopped
    assert "It was stopped after 0 s in line" in found.text and "test_exercises.py" in found.text


# ----------------------------------------------------------------------------------------------------------------------
# toy.check
# ----------------------------------------------------------------------------------------------------------------------


def test_check_prints_and_is_true_when_right(capsys):
    found = toy.check("linear", right)
    assert found and capsys.readouterr().out == found.text + "\n"
    assert repr(found) == "<linear: right>"
    wrong = toy.check("linear", lambda x, weight, bias: x @ weight.T)
    assert not wrong and wrong.hint.startswith("The bias is missing") and wrong.hint[:20] in capsys.readouterr().out
    assert repr(wrong) == "<linear: not yet>"
    assert wrong._ipython_display_() is None  # a notebook shows it once


def test_an_exercise_that_is_not_there():
    with pytest.raises(
        ValueError, match=r"there is no exercise 'lineer' \(like it: linear.*toy exercise list` names all"
    ):
        toy.check("lineer", right)


def test_help_reads_well():
    text = inspect.getdoc(toy.check)
    assert max(map(len, text.splitlines())) <= 76  # help() indents it by four
    for word in (
        'toy.check("softmax", my_softmax)',
        "toy exercise list",
        "exercise:",
        "answer:",
        "seed:",
        "Returns",
        "Raises",
    ):
        assert word in text


def test_a_teacher_adds_one_entry():
    task = Task(
        name="double",
        lesson=1,
        statement="Twice the number.",
        source="def double(x):\n    return 2 * x  #? twice\n",
        cases=lambda rng: ({"x": rng.normal(size=n)} for n in (3, 1)),
        returns=("y",),
        mistakes=(Mistake("2 * x", "x * x", "This is the square."),),
    )
    assert task.stub == "def double(x):\n    return ...  # twice\n" and task.signature == "double(x) -> y"
    assert task.solution == "def double(x):\n    return 2 * x  # twice\n"
    assert judge_answer(task, lambda x: x + x)
    assert judge_answer(task, lambda x: x**2).hint == "This is the square."
    assert judge_answer(task, lambda x: x**3).hint is None


# ----------------------------------------------------------------------------------------------------------------------
# toy exercise
# ----------------------------------------------------------------------------------------------------------------------


def test_the_list_reads_well_at_80_columns(toy_command):
    code, out, _ = toy_command("exercise", "list")
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    assert [line for line in out.splitlines() if line.startswith("Lesson")] == [
        f"Lesson {n}: {LESSONS[n]}" for n in range(10)
    ]
    flat = " ".join(out.split())
    assert all(task.signature in flat for task in TASKS.values()) and f"{len(TASKS)} exercises." in out
    code, out, _ = toy_command("exercise", "list", "7")
    assert code == 0 and "lora_merge" in out and "softmax" not in out
    assert toy_command("exercise", "list", "10")[0] == 2
    code, out, _ = toy_command("exercise")
    assert code == 0 and "toy exercise show softmax > softmax.py" in out


def test_what_is_shown_is_a_file_to_fill_in(toy_command, tmp_path):
    file = tmp_path / "answers.py"
    for name, task in TASKS.items():
        code, out, _ = toy_command("exercise", "show", name)
        assert code == 0 and task.stub in out
        comments = [line for line in out.splitlines() if line.startswith("#")]
        assert max(map(len, comments)) <= 80
    file.write_text(toy_command("exercise", "show", "linear")[1])
    code, out, _ = toy_command("exercise", "check", "linear", file)
    assert code == 1 and "still a blank (...) to fill in, in line 3 of the function: `return ...`" in " ".join(
        out.split()
    )
    file.write_text(toy_command("exercise", "show", "linear", "--solution")[1])
    code, out, _ = toy_command("exercise", "check", "linear", file)
    assert code == 0 and out.startswith("linear: right, in 3 cases") and len(out.splitlines()) == 1


def test_a_function_of_a_file(toy_command, tmp_path):
    file = tmp_path / "mine.py"
    (tmp_path / "helper_of_mine.py").write_text("def product(x, weight):\n    return x @ weight.T\n")
    source = """
        from helper_of_mine import product
        print("loaded")
        def layer(x, weight, bias):
            return product(x, weight) + bias
        def wrong(x, weight, bias):
            return product(x, weight)
    """
    file.write_text(textwrap.dedent(source))
    code, out, _ = toy_command("exercise", "check", "linear", f"{file}:layer")
    assert code == 0 and out.startswith("loaded\nlinear: right")
    code, out, err = toy_command("exercise", "check", "linear", f"{file}:wrong", "--json")
    told = json.loads(out)
    assert code == 1 and told["right"] is False and told["hint"].startswith("The bias is missing") and "loaded" in err
    code, _, err = toy_command("exercise", "check", "linear", file)
    assert code == 2 and "has no function linear; it has layer, wrong: name one" in err


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x = 1\ndef linear(x, weight, bias)\n    return x\n", "Python cannot read line 2 of mine.py: expected ':'"),
        ("x = 1\ny = 1 / 0\n", "does not run: ZeroDivisionError in line 2: division by zero"),
        ("import sys\nsys.exit(3)\n", "does not run: SystemExit in line 2: 3"),
        ("linear = 3\n", "has no function linear; it defines none"),
    ],
)
def test_files_that_do_not_do(toy_command, tmp_path, source, words):
    file = tmp_path / "mine.py"
    file.write_text(source)
    code, out, err = toy_command("exercise", "check", "linear", file)
    assert code == 2 and words in err and not out and len(err.splitlines()) == 1


def test_files_that_are_not_there(toy_command, tmp_path):
    code, _, err = toy_command("exercise", "check", "linear", tmp_path / "mine.py")
    assert code == 2 and "there is no file" in err and "exercise show linear >" in err
    code, _, err = toy_command("exercise", "check", "linear", tmp_path / "mine.ipynb")
    assert code == 2 and "is a notebook: check inside of it with `toy.check('linear', linear)`" in err
    code, _, err = toy_command("exercise", "show", "softmx")
    assert code == 2 and "there is no exercise 'softmx' (like it: softmax" in err


def test_json_has_what_a_notebook_is_made_of(toy_command):
    _, out, _ = toy_command("exercise", "list", "--json")
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["exercise"] for record in records] == list(TASKS)
    for record in records:
        task = TASKS[record["exercise"]]
        assert (record["stub"], record["solution"]) == (task.stub, task.solution)
    assert json.loads(toy_command("exercise", "show", "rope", "--json")[1]) == records[list(TASKS).index("rope")]


def test_ctrl_c_ends_the_command(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import signal\ndef softmax(scores):\n    while True:\n        signal.raise_signal(signal.SIGINT)\n"
    )
    command = [sys.executable, "-m", "toy", "exercise", "check", "softmax", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(toy.__file__).parent.parent)
    assert done.returncode == 130 and done.stderr == ""
    assert "It was stopped after 0 s in line 4 of mine.py" in done.stdout
