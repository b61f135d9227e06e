"""The commands that use a model which exists: toy generate, eval, export.

MODEL is what `toy.trained.read_trained` takes: a run directory, a checkpoint, a GGUF file, the name of a fetched model.
"""

import csv
import json
import sys
import time
from pathlib import Path

import click

from toy.cli.base import BACKEND, CHECKPOINT, MODEL, PATH, Phase, as_json, command, quoted, tell_checkpoint
from toy.cli.progress import clock, compact, printable
from toy.trained import load as trained

models = click.Group()
WEIGHT_TYPES = ("f32", "f16", "q8_0")
_ADAPTER = click.option("--adapter", type=PATH, help="LoRA adapter (GGUF) to put on the model.")


# ----------------------------------------------------------------------------------------------------------------------
# toy generate
# ----------------------------------------------------------------------------------------------------------------------


@command(models, "generate")
@MODEL
@_ADAPTER
@click.option("--prompt", help="Text to go on from. [default: a new line]")
@click.option("--chat", is_flag=True, help="The prompt is a message, and the model answers it.")
@click.option("--tokens", type=click.IntRange(min=1), default=500, show_default=True, help="Tokens to write, at most.")
@click.option(
    "--temperature", type=float, default=0.8, show_default=True, help="Below 1: safer, 0: always the likeliest."
)
@click.option("--top-k", type=int, help="Draw from the k likeliest tokens only.")
@click.option("--top-p", type=float, help="Draw from the fewest tokens whose probability reaches p.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the draws.")
@CHECKPOINT
@BACKEND
def generate(model, adapter, prompt, chat, tokens, temperature, top_k, top_p, seed, checkpoint, backend, debug):
    """Let a model write.

    MODEL is a run directory, a checkpoint, a GGUF file, or the name of a fetched model (toy fetch). It stops early at a
    token that ends a text, if the model has such tokens.
    """
    from toy.models.generation import generate as generate_ids

    with Phase(2, debug):
        if chat and prompt is None:
            raise ValueError('--chat needs a message to answer: give one with --prompt "..."')
        loaded = trained.load_trained(model, adapter, backend, checkpoint)
        named, model, tokenizer = model, loaded.model, loaded.tokenizer
        if chat:
            ids = trained.chat_prompt(tokenizer, prompt, model.config.context_length)
        elif prompt is not None:
            ids = trained.text_ids(tokenizer, prompt, "prompt")
        else:
            ids = trained.first_prompt(tokenizer, [0])
        stops = getattr(tokenizer, "stop_ids", ())
        speed = Speed(len(ids), generate_ids(model, ids, tokens, temperature, top_k, top_p, seed, stops))
        stream = tokenizer.stream(speed)
    with Phase(1, debug):
        tell_checkpoint(named, loaded.path, loaded.step, checkpoint)
        clean = printable if sys.stdout.isatty() else str
        if not chat:
            click.echo(clean(prompt or ""), nl=False)
        try:
            for text in stream:
                click.echo(clean(text), nl=False)
        finally:  # Ctrl-C too: the shell's prompt and the speed begin on a line of their own
            click.echo()
            if sys.stderr.isatty():
                click.echo(click.style(speed, dim=True), err=True)


class Speed:
    """Passes the ids of `toy.models.generation.generate` on and measures: the prompt is read before the first one comes."""

    def __init__(self, n_prompt, ids):
        self.n_prompt, self.n_generated, self._ids = n_prompt, 0, ids
        self.prompt_seconds = self.seconds = 0.0

    def __iter__(self):
        started = time.perf_counter()
        for token in self._ids:
            now = time.perf_counter()
            if self.n_generated == 0:
                self.prompt_seconds = now - started
            self.n_generated += 1
            self.seconds = now - started - self.prompt_seconds
            yield token

    def __str__(self):
        parts = [f"prompt {self.n_prompt} tokens"]
        if self.prompt_seconds > 0:
            parts[0] += f", {compact(self.n_prompt / self.prompt_seconds)} tok/s"
        parts.append(f"generated {self.n_generated} tokens")
        if self.n_generated > 1 and self.seconds > 0:
            parts[1] += f", {compact((self.n_generated - 1) / self.seconds)} tok/s"
        return "; ".join(parts)


# ----------------------------------------------------------------------------------------------------------------------
# toy eval
# ----------------------------------------------------------------------------------------------------------------------


@command(models, "eval")
@MODEL
@_ADAPTER
@click.option(
    "--corpus", help="Text file, or a folder. [default: a run's own validation part, else Python's documentation]"
)
@click.option("--data", help="Of an image model: a data set, all of it. [default: the test part of the run's own]")
@click.option("--context", type=int, help="Tokens in a window. [default: the model's, at most 512]")
@click.option("--stride", type=int, help="Tokens from window to window. [default: half of --context]")
@click.option("--limit", type=int, metavar="TOKENS", help="Read only the beginning of the text.")
@click.option("--tokens-out", type=PATH, metavar="FILE", help="Write every token's log-probability (.csv or .jsonl).")
@click.option("--json", "json_wanted", is_flag=True, help="One JSON object, on stdout.")
@CHECKPOINT
@BACKEND
def evaluate(model, adapter, corpus, data, context, stride, limit, tokens_out, json_wanted, checkpoint, backend, debug):
    """Measure how well a model predicts a text, or how often an image model is right.

    MODEL is as in toy generate. The text is read in windows that overlap; every token but the first is predicted once, after
    at least context - stride others (but for the beginning of the text).
    """
    from toy.data import load_corpus
    from toy.trained.evaluate import TextEvaluator, token_bytes

    with Phase(2, debug):
        if tokens_out is not None:
            if tokens_out.suffix not in (".csv", ".jsonl"):
                raise ValueError(f"--tokens-out must end with .csv or .jsonl, got {str(tokens_out)!r}")
            _check_folder(tokens_out)
        stored, named = trained.read_trained(model, adapter, checkpoint), model
        if not stored.reads_text:
            texts = {"--corpus": corpus, "--context": context, "--stride": stride, "--limit": limit}
            if given := [name for name, value in {**texts, "--tokens-out": tokens_out}.items() if value is not None]:
                raise ValueError(
                    f"{given[0]} is for models that read text, {model} reads images: --data names a data set"
                )
            return _evaluate_images(model, data, json_wanted, backend, checkpoint)
        if data is not None:
            raise ValueError(f"--data is for image models, {model} reads text: --corpus names one")
        own = corpus is None and "corpus" in stored.about and tokens_out is context is stride is limit is None
        model, tokenizer, step, _ = trained.load_trained(model, adapter, backend, checkpoint)
        if own:
            tell_checkpoint(named, stored.path, step, checkpoint)
            return _evaluate_own(model, tokenizer, stored.about, step, json_wanted)
        text = load_corpus(corpus).text
        job = TextEvaluator(model, tokenizer, text, context, stride, limit)
    with Phase(1, debug):
        tell_checkpoint(named, stored.path, step, checkpoint)
        result = _with_bar(job)
        if json_wanted:
            numbers = {name: getattr(result, name) for name in ("loss", "perplexity", "bits_per_byte", "n_tokens")}
            if tokens_out is None:
                return as_json(numbers | {"checkpoint": step})
        click.echo(f"{'loss':<15}{result.loss:.4f} nats per token")
        click.echo(f"{'perplexity':<15}{result.perplexity:.4g}")
        click.echo(f"{'bits per byte':<15}{result.bits_per_byte:.4f}")
        click.echo(f"{'tokens':<15}{result.n_tokens} ({result.n_bytes} bytes)")
        click.echo(f"{'windows':<15}{result.context} tokens, {result.stride} at a time")
        if tokens_out is not None:
            pieces = [token_bytes(tokenizer, i).decode("utf-8", errors="replace") for i in result.token_ids.tolist()]
            _write_tokens(tokens_out, zip(result.token_ids.tolist(), pieces, result.log_probabilities.tolist()))
            click.echo(f"{'per token':<15}{tokens_out}")


def _evaluate_own(model, tokenizer, config, step, json_wanted):
    """The validation part of a run, all of it."""
    from toy.trained.evaluate import evaluate_run

    result = evaluate_run(model, tokenizer, config)
    if json_wanted:
        numbers = {name: getattr(result, name) for name in ("loss", "perplexity", "bits_per_byte", "n_tokens")}
        return as_json(numbers | {"checkpoint": step})
    click.echo(f"{'loss':<15}{result.loss:.4f} nats per token")
    click.echo(f"{'perplexity':<15}{result.perplexity:.4g}")
    click.echo(f"{'bits per byte':<15}{result.bits_per_byte:.4f}")
    click.echo(f"{'tokens':<15}{result.n_tokens} ({result.n_bytes} bytes), all of the run's validation part")


def _evaluate_images(model, data, json_wanted, backend, checkpoint):
    from toy.trained.classify import Classifier

    classifier = Classifier(model, backend, checkpoint)
    result = classifier.evaluate(data)
    if json_wanted:
        return as_json(result._asdict() | {"checkpoint": classifier.step})
    click.echo(f"{'loss':<15}{result.loss:.4f} nats per image")
    click.echo(f"{'right':<15}{100 * result.accuracy:.2f} %")
    click.echo(f"{'images':<15}{result.n_images}")


def _with_bar(job):
    """Run an evaluation to its end, with a line on a terminal's stderr."""
    started = time.monotonic()
    show = sys.stderr.isatty()
    for done in job:
        if show:
            left = (time.monotonic() - started) * (job.n_tokens - done) / done
            click.echo(f"\r{done}/{job.n_tokens} tokens, {clock(left)} left \033[K", nl=False, err=True)
    if show:
        click.echo("\r\033[K", nl=False, err=True)
    return job.result()


def _write_tokens(path, rows):
    """rows: (token id, text, natural log-probability)."""
    from toy.files.atomic import replacing

    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.writer(file)
            writer.writerow(("token", "text", "logprob"))
            writer.writerows((token, text, f"{logprob:.6f}") for token, text, logprob in rows)
        else:
            for token, text, logprob in rows:
                line = {"token": token, "text": text, "logprob": round(logprob, 6)}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


# ----------------------------------------------------------------------------------------------------------------------
# toy export
# ----------------------------------------------------------------------------------------------------------------------


@command(models, "export")
@MODEL
@click.option("--adapter", is_flag=True, help="Of a LoRA run: the adapter alone. [default for one]")
@click.option("--merge", is_flag=True, help="Of a LoRA run: the whole model with the adapter in it.")
@click.option("--lora", type=PATH, metavar="FILE.gguf", help="Merge the adapter in this file into the model.")
@click.option("--type", "kind", type=click.Choice(WEIGHT_TYPES), default="f32", show_default=True, help="Of matrices.")
@click.option("--out", type=PATH, metavar="FILE.gguf", help="The file to write. [default: named after MODEL, here]")
@click.option("--force", is_flag=True, help="Overwrite a file that is there.")
@CHECKPOINT
def export(model, adapter, merge, lora, kind, out, force, checkpoint, debug):
    """Write a model as a GGUF file for llama.cpp.

    MODEL is as in toy generate. A LoRA run gives its adapter alone, for llama.cpp's --lora, or with --merge a whole model. A
    GGUF file is written anew in another type; with --lora, that adapter is merged in.
    """
    from toy.trained import export as exports

    with Phase(2, debug):
        if adapter and (merge or lora is not None):
            raise ValueError("--adapter writes the adapter alone and --merge or --lora a whole model: choose one")
        stored = trained.read_trained(model, lora, checkpoint)
        exports.check_exportable(stored)
        if (merge or adapter) and not stored.adapters:
            raise ValueError(f"{model} has no adapter of its own: leave out --{'merge' if merge else 'adapter'}")
        whole = merge or lora is not None or not stored.adapters
        if not whole and kind != "f32":
            raise ValueError(f"an adapter is always written as f32: add --merge to export a whole model as {kind}")
        out = out or Path(f"{_name_of(model)}-{kind if whole else 'adapter'}.gguf")
        if out.exists() and not force:
            raise ValueError(f"{out} is there already: choose another --out, or overwrite it with --force")
        _check_folder(out)
    with Phase(1, debug):
        tell_checkpoint(model, stored.path, stored.step, checkpoint)
        if whole:
            exports.export_model(stored, out, kind)
        else:
            exports.export_adapter(stored, out)
        click.echo(f"{out} ({out.stat().st_size / 1e6:.1f} MB)")
        click.echo(llama_cpp_command(stored, out, whole))


def llama_cpp_command(stored, out, whole):
    """What to type to use the file with llama.cpp."""
    chat = getattr(stored.tokenizer, "chat_template", None) is not None
    files = f"-m {quoted(out)}" if whole else f"-m {quoted(stored.base)} --lora {quoted(out)}"
    return f"llama-cli {files}" if chat else f"llama-completion {files} -p 'Once upon a time'"


def _name_of(model):
    path = Path(model)
    return path.resolve().name if path.is_dir() else path.stem


def _check_folder(path):
    folder = path.parent
    if path.is_dir() or not folder.is_dir():
        raise ValueError(
            f"{path} cannot be written: " + ("it is" if path.is_dir() else f"{folder} is not") + " a directory"
        )
