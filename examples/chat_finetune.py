"""Teach a chat model a manner of answering, from conversations, and see that it still knows when to stop.

    toy fetch smollm2-135m
    python examples/chat_finetune.py runs/manner

The corpus is 30 conversations of two turns, written here; your own are a .jsonl file with {"messages": [{"role": "user",
"content": "..."}, {"role": "assistant", "content": "..."}, ...]} on each line. The model's own chat template makes tokens of
them; only the answers, and the token that ends each, are learned.
"""

import json
import sys
import tempfile
from pathlib import Path

from toy.models.generation import generate
from toy.trained import load_trained
from toy.trained.load import chat_prompt
from toy.training import LoRAOptions, Training

OPPOSITES = (
    "hot cold, big small, early late, fast slow, high low, light dark, open closed, old new, rich poor, wet dry, hard soft, "
    "full empty, strong weak, loud quiet, near far, clean dirty, cheap expensive, happy sad, sharp blunt, thick thin, "
    "deep shallow, wide narrow, rough smooth, sweet bitter, safe dangerous, true false, brave afraid, noisy silent, "
    "push pull, buy sell"
)
QUESTION = "What is the opposite of {}?"  # about words that are not among them


def conversations():
    """A list of {"messages": [...]}: two questions, each answered in the manner that is to be learned."""
    rows = []
    for pair in OPPOSITES.split(", "):
        one, other = pair.split()
        turns = [(QUESTION.format(one), other), (f"And of {other}?", one)]
        messages = []
        for question, word in turns:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": f"{word.capitalize()}, of course."})
        rows.append({"messages": messages})
    return rows


def answer(model, tokenizer, question, n_tokens=40):
    """The likeliest answer -> (its ids, fewer than n_tokens when the model ended it itself; its text)."""
    ids = chat_prompt(tokenizer, question, model.config.context_length)
    answered = list(generate(model, ids, n_tokens, temperature=0.0, stop_ids=tokenizer.stop_ids))
    return answered, tokenizer.decode(answered)


def train(out, model="smollm2-135m", steps=30, **changes):
    """A LoRA run on the conversations, in the directory `out` -> the `Training`, done."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "conversations.jsonl"
        corpus.write_text("".join(json.dumps(row) + "\n" for row in conversations()))
        options = dict(rank=8, targets=("q", "v"), lr=1e-3, warmup=3, batch=4, context=96, eval_every=10) | changes
        training = Training(LoRAOptions(model=str(model), corpus=str(corpus), steps=steps, **options), out=out)
        for notice in training.notices():
            print("note:", notice)
        for event in training.run():
            if event.kind == "eval":
                print(f"step {event.step}: validation loss {event.loss:.3f}")
    return training


def main(out):
    questions = [QUESTION.format(word) for word in ("tall", "young", "heavy")]
    for name, path in (("before", "smollm2-135m"), ("after", out)):
        if name == "after":
            train(out)
        opened = load_trained(path)
        for question in questions:
            ids, text = answer(opened.model, opened.tokenizer, question)
            print(f"{name}: {question} {text!r} ({len(ids)} tokens)")


if __name__ == "__main__":
    main(sys.argv[1])
