"""The commands that use a model which exists: toy generate, eval, export.

MODEL is what `toy.trained.read_trained` takes: a run directory, a checkpoint, a GGUF file, a Hugging Face folder, the name
of a fetched model.
"""

import csv
import json
import re
import sys
import time
from pathlib import Path

import click

from toy.cli.base import (
    ADAPTER,
    BACKEND,
    CHECKPOINT,
    DEVICE,
    JSON,
    MODEL,
    PATH,
    PRECISION,
    Phase,
    adapter_option,
    as_json,
    command,
    note,
    program,
    quoted,
    tell_checkpoint,
)
from toy.cli.progress import clock, compact, printable
from toy.data.encoding import Encoder
from toy.trained import load as trained

models = click.Group()


# ----------------------------------------------------------------------------------------------------------------------
# toy generate
# ----------------------------------------------------------------------------------------------------------------------


@command(models, "generate")
@MODEL
@ADAPTER
@click.option("--prompt", help="Text to go on from; @FILE reads it from a file, - from stdin. [default: a new line]")
@click.option("--special", is_flag=True, help="Special tokens written in the prompt, <|im_end|> say, are tokens.")
@click.option("--chat", is_flag=True, help="The prompt is a message, and the model answers it.")
@click.option("--system", metavar="TEXT", help="With --chat: a system message before it; @FILE and - as in --prompt.")
@click.option("--tokens", type=click.IntRange(min=1), default=500, show_default=True, help="Tokens to write, at most.")
@click.option("--stop", multiple=True, metavar="TEXT", help="Stop before this text; may be given several times.")
@click.option(
    "--temperature", type=float, default=0.8, show_default=True, help="Below 1: safer, 0: always the likeliest."
)
@click.option("--top-k", type=int, help="Draw from the k likeliest tokens only.")
@click.option("--top-p", type=float, help="Draw from the fewest tokens whose probability reaches p.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the draws.")
@click.option(
    "--num-samples", type=click.IntRange(min=1), default=1, help="Texts to write: with the seed, the one after it, ..."
)
@click.option("--json", "json_wanted", is_flag=True, help="One JSON object a text, on stdout: text, ids, and more.")
@CHECKPOINT
@BACKEND
@DEVICE
@PRECISION
def generate(
    model,
    adapter,
    prompt,
    special,
    chat,
    system,
    tokens,
    stop,
    temperature,
    top_k,
    top_p,
    seed,
    num_samples,
    json_wanted,
    checkpoint,
    backend,
    device,
    precision,
    debug,
):
    """Let a model write.

    MODEL is a run directory, a checkpoint, a GGUF file, a Hugging Face folder, or the name of a fetched model (toy fetch).
    It stops early at a token that ends a text, if the model has such tokens. Of a file or stdin the last line end is not
    part of the text; a prompt that begins with @ itself is given as @@.
    """
    from toy.models.generation import generate as generate_ids
    from toy.trained.generator import check_generator, generator
    from toy.trained.writing import Writing, check_stop, stop_ids_of

    with Phase(2, debug):
        if chat and prompt is None:
            raise ValueError('--chat needs a message to answer: give one with --prompt "..."')
        if system is not None and not chat:
            raise ValueError("--system goes with --chat: without it write everything into --prompt, with --special")
        if special and (chat or prompt is None):
            problem = "--chat parses those of the template alone" if chat else "give a text with --prompt"
            raise ValueError(f"--special is about special tokens in a prompt: {problem}")
        if prompt == system == "-":
            raise ValueError(
                "--prompt and --system cannot both be read from stdin: put one into a file, and give @FILE"
            )
        check_stop(stop)
        check_generator(backend, device, precision)
        if num_samples > 1 and temperature == 0:
            note(f"at temperature 0 nothing is drawn: all {num_samples} texts are the same")
        prompt, system = text_of(prompt, "--prompt"), text_of(system, "--system")
        loaded = trained.load_trained(model, adapter, backend, checkpoint)
        named, model, tokenizer = model, loaded.model, loaded.tokenizer
        if chat:
            ids = trained.chat_prompt(tokenizer, prompt, model.config.context_length, system)
        elif prompt is not None:
            ids = _prompt_ids(tokenizer, prompt, special, model.config.context_length)
        else:
            ids = trained.first_prompt(tokenizer, [0])
        stops = stop_ids_of(tokenizer, stop)
        writer = generator(model, backend, device, precision)
        streams = [
            generate_ids(writer.model, ids, tokens, temperature, top_k, top_p, seed + i, stops)
            for i in range(num_samples)
        ]
    with Phase(1, debug):
        tell_checkpoint(named, loaded.step, checkpoint)
        if writer.notice:
            note(writer.notice)
        for i, stream in enumerate(streams):
            speed = Speed(min(len(ids), model.config.context_length), stream, writer.how)
            writing = Writing(tokenizer, speed, stop)
            if json_wanted:
                for _ in writing:
                    pass
                as_json(
                    {
                        "prompt": prompt,
                        "text": writing.text,
                        "finish_reason": "length" if speed.n_generated == tokens and not writing.stopped_by else "stop",
                        "seed": seed + i,
                        "prompt_ids": [int(token) for token in ids],
                        "ids": [int(token) for token in writing.ids],
                        "computed_by": writer.how,
                        "timings": {"prompt_per_second": speed.of_prompt, "predicted_per_second": speed.of_new},
                    }
                )
                continue
            if num_samples > 1:
                click.echo(f"--- {i + 1}, seed {seed + i} ---")
            _show_text(writing, "" if chat or prompt is None else prompt, speed)


def _show_text(writing, prompt, speed):
    """Print the prompt and a `Writing` as it comes; on a terminal's stderr then how fast it was."""
    clean = printable if sys.stdout.isatty() else str
    click.echo(clean(prompt), nl=False)
    try:
        for text in writing:
            click.echo(clean(text), nl=False)
    finally:  # Ctrl-C too: the shell's prompt and the speed begin on a line of their own
        click.echo()
        if sys.stderr.isatty():
            click.echo(click.style(speed, dim=True), err=True)


def text_of(value, option):
    """The text of an option: itself, for @FILE what is in the file, for - what is in stdin, without the last line end.

    Raises ValueError, naming the option, for bytes that are not UTF-8; OSError for a file that cannot be read.
    """
    if value is None or not (value == "-" or value.startswith("@")):
        return value
    if value.startswith("@@"):
        return value[1:]
    where = "stdin" if value == "-" else value[1:]
    if not where:
        raise ValueError(f"{option} @ names no file: @FILE reads one, @@ begins a text with @")
    data = sys.stdin.buffer.read() if value == "-" else Path(where).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{option}: {where} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start} ({error.reason}); "
            "convert it first, for example with iconv"
        ) from error
    return re.sub(r"\r?\n\Z", "", text)


def _prompt_ids(tokenizer, prompt, special, context_length):
    """The ids of --prompt; a note for what becomes of one that is too long, or has its beginning token twice."""
    encoder = Encoder(tokenizer)
    if special and not encoder.has_special:
        raise ValueError(f"this model's tokenizer ({tokenizer.kind}) has no special tokens: leave out --special")
    ids = encoder.prompt(prompt, special)
    if encoder.begin is not None and ids[:2].tolist() == [encoder.begin, encoder.begin]:
        note("the beginning token stands there twice, the model adds one by itself: leave it out of the prompt")
    if len(ids) > context_length:
        note(f"the prompt has {len(ids)} tokens, the model reads the last {context_length}: that is its context")
    return ids


class Speed:
    """Passes the ids of `toy.models.generation.generate` on and measures: the prompt is read before the first one comes.

    how: what computes them, for the line that tells. Tokens a second: of_prompt, and of_new; None before they are known.
    """

    def __init__(self, n_prompt, ids, how=""):
        self.n_prompt, self.n_generated, self._ids, self.how = n_prompt, 0, ids, how
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

    @property
    def of_prompt(self):
        return self.n_prompt / self.prompt_seconds if self.prompt_seconds > 0 else None

    @property
    def of_new(self):
        return (self.n_generated - 1) / self.seconds if self.n_generated > 1 and self.seconds > 0 else None

    def __str__(self):
        parts = [f"prompt {self.n_prompt} tokens", f"generated {self.n_generated} tokens"]
        for i, speed in enumerate((self.of_prompt, self.of_new)):
            if speed is not None:
                parts[i] += f", {compact(speed)} tok/s"
        return "; ".join(parts) + (f" ({self.how})" if self.how else "")


# ----------------------------------------------------------------------------------------------------------------------
# toy eval
# ----------------------------------------------------------------------------------------------------------------------


@command(models, "eval")
@MODEL
@ADAPTER
@click.option(
    "--corpus", help="Text file, or a folder. [default: a run's own validation part, else Python's documentation]"
)
@click.option("--data", help="Of an image model: a data set, all of it. [default: the test part of the run's own]")
@click.option("--context", type=int, help="Tokens in a window. [default: the model's, at most 512]")
@click.option("--stride", type=int, help="Tokens from window to window. [default: half of --context]")
@click.option("--limit", type=int, metavar="TOKENS", help="Read only the beginning of the text.")
@click.option(
    "--like", type=click.Choice(["llama-perplexity"]), help="Compute what that program of llama.cpp computes."
)
@click.option(
    "--unknown",
    type=click.Choice(["error", "skip"]),
    default="error",
    show_default=True,
    help="What to do about characters that the model has no token for.",
)
@click.option("--tokens-out", type=PATH, metavar="FILE", help="Write every token's log-probability (.csv or .jsonl).")
@JSON
@CHECKPOINT
@BACKEND
def evaluate(
    model,
    adapter,
    corpus,
    data,
    context,
    stride,
    limit,
    like,
    unknown,
    tokens_out,
    json_wanted,
    checkpoint,
    backend,
    debug,
):
    """Measure how well a model predicts a text, or how often an image model is right.

    MODEL is as in toy generate. The text is read in windows that overlap; every token but the first is predicted once, after
    at least context - stride others (but for the beginning of the text). Like llama-perplexity the windows are side by side,
    and of each the second half is counted.
    """
    from toy.data import load_corpus
    from toy.data.sources import open_source
    from toy.trained.evaluate import TextEvaluator, skipped_in_words, token_bytes, training_text_in_words

    with Phase(2, debug):
        if tokens_out is not None:
            if tokens_out.suffix not in (".csv", ".jsonl"):
                raise ValueError(f"--tokens-out must end with .csv or .jsonl, got {str(tokens_out)!r}")
            _check_folder(tokens_out)
        stored, named = trained.read_trained(model, adapter, checkpoint), model
        if not stored.reads_text:
            texts = {"--corpus": corpus, "--context": context, "--stride": stride, "--limit": limit, "--like": like}
            if given := [name for name, value in {**texts, "--tokens-out": tokens_out}.items() if value is not None]:
                raise ValueError(
                    f"{given[0]} is for models that read text, {model} reads images: --data names a data set"
                )
            return _evaluate_images(model, data, json_wanted, backend, checkpoint)
        if data is not None:
            raise ValueError(f"--data is for image models, {model} reads text: --corpus names one")
        chosen = (corpus, tokens_out, context, stride, limit, like)
        own = "corpus" in stored.about and all(option is None for option in chosen)
        model, tokenizer, step = trained.load_trained(model, adapter, backend, checkpoint)
        if own:
            tell_checkpoint(named, step, checkpoint)
            return _evaluate_own(model, tokenizer, stored.about, step, json_wanted)
        text = load_corpus(corpus).text
        job = TextEvaluator(model, tokenizer, text, context, stride, limit, like, unknown)
        if told := training_text_in_words(stored.about, open_source(None if corpus is None else Path(corpus))):
            note(told)
        if job.skipped:
            note(skipped_in_words(job.skipped))
    with Phase(1, debug):
        tell_checkpoint(named, step, checkpoint)
        result = _with_bar(job)
        if tokens_out is not None:
            pieces = [token_bytes(tokenizer, i).decode("utf-8", errors="replace") for i in result.token_ids.tolist()]
            _write_tokens(tokens_out, zip(result.token_ids.tolist(), pieces, result.log_probabilities.tolist()))
        if json_wanted:
            numbers = {name: getattr(result, name) for name in ("loss", "perplexity", "bits_per_byte", "n_tokens")}
            if like is not None:
                numbers |= {"perplexity_error": result.perplexity_error, "like": like}
            if unknown == "skip":
                numbers["n_skipped"] = result.n_skipped
            return as_json(numbers | {"checkpoint": step})
        click.echo(f"{'loss':<15}{result.loss:.4f} nats per token")
        error = "" if like is None else f" +/- {result.perplexity_error:.4f}"
        click.echo(f"{'perplexity':<15}{result.perplexity:{'.4g' if like is None else '.4f'}}{error}")
        click.echo(f"{'bits per byte':<15}{result.bits_per_byte:.4f}")
        click.echo(f"{'tokens':<15}{result.n_tokens} ({result.n_bytes} bytes)")
        way = f"{result.stride} at a time" if like is None else f"the second half of each counted, like {like}"
        click.echo(f"{'windows':<15}{result.context} tokens, {way}")
        if tokens_out is not None:
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
@adapter_option("--lora", "Merge this adapter into the model, times SCALE")
@click.option(
    "--type",
    "kind",
    metavar="TYPE",
    help="Of matrices: f32, f16, bf16, q8_0, q6_k, q5_k_m, q5_k_s, q4_k_m, q4_k_s, q5_0, q5_1, q4_0, q4_1, iq4_nl, or "
    "keep: as they are.  [default: f32; of --merge and --lora: keep]",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["gguf", "hf", "peft"]),
    default="gguf",
    show_default=True,
    help="hf: a folder for transformers, with a run's adapter merged in; peft: a run's adapter as a folder for PEFT.",
)
@click.option(
    "--ollama",
    type=PATH,
    metavar="DIR",
    help="Write a folder for `ollama create`: a Modelfile, the model, the adapter.",
)
@click.option("--out", type=PATH, metavar="PATH", help="What to write. [default: named after MODEL, here]")
@click.option("--force", is_flag=True, help="Overwrite what is there.")
@JSON
@CHECKPOINT
def export(model, adapter, merge, lora, kind, form, ollama, out, force, json_wanted, checkpoint, debug):
    """Write a model as a GGUF file for llama.cpp, or as a folder for transformers, PEFT or Ollama.

    MODEL is as in toy generate. A LoRA run gives its adapter alone, for llama.cpp's --lora, or with --merge a whole model. A
    GGUF file is written anew in another type; with --lora, that adapter is merged in.
    """
    from toy.trained import export as exports

    if form != "gguf" or ollama is not None:
        return _export_folder(
            model, adapter, merge, lora, kind, form, ollama, out, force, json_wanted, checkpoint, debug
        )
    with Phase(2, debug):
        if adapter and (merge or lora is not None):
            raise ValueError("--adapter writes the adapter alone and --merge or --lora a whole model: choose one")
        stored = trained.read_trained(model, lora, checkpoint)
        exports.check_exportable(stored)
        if (merge or adapter) and not stored.adapters:
            raise ValueError(f"{model} has no adapter of its own: leave out --{'merge' if merge else 'adapter'}")
        whole = merge or lora is not None or not stored.adapters
        if kind not in (None, *exports.EXPORT_TYPES):
            raise ValueError(f"--type {kind!r} is not one of {', '.join(exports.EXPORT_TYPES)}")
        kind = kind or ("keep" if whole and stored.adapters else "f32")
        if not whole and kind != "f32":
            raise ValueError(f"an adapter is always written as f32: add --merge to export a whole model as {kind}")
        out = out or Path(f"{_name_of(model)}-{kind if whole else 'adapter'}.gguf")
        if out.suffix != ".gguf" and not out.is_dir():
            raise ValueError(f"what is written is a GGUF file, and {out} does not end with .gguf: give it that ending")
        if out.exists() and not force:
            raise ValueError(f"{out} is there already: choose another --out, or overwrite it with --force")
        _check_folder(out)
    with Phase(1, debug):
        tell_checkpoint(model, stored.step, checkpoint)
        if whole:
            exports.export_model(stored, out, kind)
        else:
            exports.export_adapter(stored, out)
        n_bytes, to_type = out.stat().st_size, llama_cpp_command(stored, out, whole)
        if json_wanted:
            written = {"path": str(out), "bytes": n_bytes, "adapter": not whole, "type": kind}
            return as_json(written | {"command": to_type, "checkpoint": stored.step})
        click.echo(f"{out} ({n_bytes / 1e6:.1f} MB)")
        click.echo(to_type)


def _export_folder(model, adapter, merge, lora, kind, form, ollama, out, force, json_wanted, checkpoint, debug):
    """The forms that are folders."""
    from toy.files.folders import check_replaceable
    from toy.trained import export as exports
    from toy.trained import ollama as ollamas

    with Phase(2, debug):
        if ollama is not None and (form != "gguf" or out is not None):
            other = f"--format {form}" if out is None else f"--out {out}"
            raise ValueError(f"--ollama {ollama} names the folder, of GGUF files: leave out {other}")
        form, out = ("ollama", ollama) if ollama is not None else (form, out)
        if form == "peft" and (merge or kind is not None):
            raise ValueError("--format peft writes an adapter alone, in float32: leave out --merge and --type")
        if adapter and form == "hf":
            raise ValueError("--format hf writes a whole model: an adapter alone is written by --format peft")
        if adapter and (merge or lora is not None):
            raise ValueError("--adapter writes the adapter alone and --merge or --lora a whole model: choose one")
        stored = trained.read_trained(model, lora, checkpoint)
        exports.check_exportable(stored)
        if (merge or adapter or form == "peft") and not stored.adapters:
            given = "merge" if merge else "adapter" if adapter else "format peft"
            raise ValueError(f"{model} has no adapter of its own: leave out --{given}")
        known = (*exports.HUGGING_FACE_TYPES, exports.KEEP) if form == "hf" else exports.EXPORT_TYPES
        if kind not in (None, *known):
            raise ValueError(f"--type {kind!r} is not one of {', '.join(known)}")
        out = out or Path(f"{_name_of(model)}-{form}")
        if out.suffix == ".gguf":
            raise ValueError(f"what is written is a folder, and {out} ends with .gguf: give it another name")
        if out.exists() and not force and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} is there already: choose another --out, or overwrite it with --force")
        names = {"hf": exports.HUGGING_FACE_FILES, "peft": exports.PEFT_FILES, "ollama": ollamas.FILES}[form]
        check_replaceable(out, names)
        if not out.parent.is_dir():
            raise ValueError(f"{out} cannot be written: {out.parent} is not a directory")
    with Phase(1, debug):
        tell_checkpoint(model, stored.step, checkpoint)
        if form == "hf":
            exports.export_hugging_face(stored, out, kind or ("keep" if stored.adapters else "f32"))
            use = f"AutoModelForCausalLM.from_pretrained({str(out)!r})"
        elif form == "peft":
            exports.export_peft(stored, out)
            use = f"PeftModel.from_pretrained(model, {str(out)!r})"
        else:
            for sentence in ollamas.export_ollama(stored, out, kind, merge or lora is not None):
                note(sentence)
            use = f"ollama create {_name_of(out).lower()} -f {quoted(out / 'Modelfile')}"
        n_bytes = sum(entry.stat().st_size for entry in out.iterdir())
        if json_wanted:
            written = {"path": str(out), "bytes": n_bytes, "format": form, "adapter": form == "peft", "type": kind}
            return as_json(written | {"command": use, "checkpoint": stored.step})
        click.echo(f"{out} ({n_bytes / 1e6:.1f} MB)")
        click.echo(use)


def llama_cpp_command(stored, out, whole):
    """What to type to use the file with llama.cpp."""
    chat = getattr(stored.tokenizer, "chat_template", None) is not None
    files, before = f"-m {quoted(out)}" if whole else f"-m {quoted(stored.base)} --lora {quoted(out)}", ""
    if not whole and stored.base.is_dir():  # a Hugging Face folder, which llama.cpp does not read
        base = f"{stored.base.name}.gguf"
        before = f"{program()} export {quoted(stored.base)} --type keep --out {quoted(base)} && "
        files = f"-m {quoted(base)} --lora {quoted(out)}"
    return before + (f"llama-cli {files}" if chat else f"llama-completion {files} -p 'Once upon a time'")


def _name_of(model):
    path = Path(model)
    return path.resolve().name if path.is_dir() else path.stem


def _check_folder(path):
    folder = path.parent
    if path.is_dir() or not folder.is_dir():
        raise ValueError(
            f"{path} cannot be written: " + ("it is" if path.is_dir() else f"{folder} is not") + " a directory"
        )
