"""How a run begins, whatever its recipe: what the training loop asks of a recipe, and what all runs on text share."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np

from toy.config import LanguageModelConfig, ModelConfig, RecipeOptions
from toy.data.encoding import Encoder
from toy.data.open_tokenizer import load_tokenizer
from toy.data.records import Conversation
from toy.data.sources import open_source
from toy.data.tokenizers import Tokenizer
from toy.data.training_data import TextData
from toy.engines import EngineHandle
from toy.engines.base import Arrays
from toy.engines.memory import check_fits
from toy.files import BadFileError, Run
from toy.files.atomic import StrPath
from toy.files.gguf_write import write_gguf
from toy.files.hugging_face import is_model_folder, open_model
from toy.files.places import find_model
from toy.files.safetensors_file import refuse_pickle
from toy.models import ARCHITECTURES
from toy.models.base import LanguageModel
from toy.models.generation import generate
from toy.trained.load import first_prompt
from toy.training.options import RECOMPUTE, FromModelOptions, RunOptions, TextOptions

_SAMPLED_TOKENS = 8  # of which the time of a sample is estimated


class Decision(NamedTuple):
    """One line of what is printed at the start. reason: why this value, "" when it was simply asked for."""

    name: str
    value: str
    reason: str = ""


class Start:
    """What the training loop asks of a recipe. Made from options, it opens what they name and checks all that can be checked
    before the data are read; `read` reads them, `realize` builds the model. Nothing is written.

    options: with everything filled in that depends on the model or the data. recipe: realized by `realize`. config: of the
    model, after `read`. `toy train` shows the docstring of a subclass as its help.
    """

    options_class: ClassVar[type[RunOptions]]
    recipe_class: ClassVar[type[EngineHandle]]
    unit: ClassVar[str]  # what the loss is a mean over, and what is counted: "token", "image"
    next_command: ClassVar[tuple[str, ...]] = (
        "write",
        "generate",
    )  # what to try: in a word, the command, what follows the run

    options: RunOptions
    recipe: EngineHandle
    config: ModelConfig
    bytes_per_token: float | None = None
    data: Any  # what the batches are drawn from

    def __init__(self, options: Any) -> None:
        self.options = options
        self.recipe = self.recipe_class(backend=options.backend, device=options.device)
        self.config = None  # type: ignore[assignment]
        self.progress: Callable[[int, int], None] | None = (
            None  # progress(done, total) in bytes while a long text is encoded
        )

    def read(self) -> None:
        """Read the data; `config` and the options are complete then."""
        raise NotImplementedError

    def realize(self) -> None:
        """Realize the recipe."""
        raise NotImplementedError

    def recipe_options(self, t_seq: int, **more: Any) -> RecipeOptions:
        """The `RecipeOptions` that follow from the run's options."""
        o = self.options
        return RecipeOptions(
            t_seq=t_seq,
            t_batch=o.batch,
            accumulate=o.accumulate,
            seed=o.seed,
            grad_clip=o.clip or None,
            weight_dtype=o.weight_dtype,
            precision=o.precision,
            recompute=RECOMPUTE[o.recompute],
            **more,
        )

    # -- while it trains ----------------------------------------------------------------------------------------------

    @property
    def per_step(self) -> int:
        """How many tokens (images) a step trains on."""
        raise NotImplementedError

    @property
    def n_train(self) -> int:
        """How many tokens (images) there are to train on."""
        raise NotImplementedError

    @property
    def steps_per_epoch(self) -> float:
        """How many steps see as much as there is to train on."""
        return self.n_train / self.per_step

    def training_batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, labels) of a step, a function of (seed, step) alone."""
        raise NotImplementedError

    def validate(self) -> dict[str, float]:
        """dict of the fields of an `Evaluation` besides its step: the mean loss over the validation part, and more."""
        raise NotImplementedError

    def sample(self, step: int, n_tokens: int | None = None) -> str | None:
        """What the model makes at this step, as text; None for recipes that show nothing. n_tokens: None = as the options
        say."""
        return None

    def validation_seconds(self) -> float:
        """How long a validation takes, measured."""
        started = time.perf_counter()
        self.validate()
        return time.perf_counter() - started

    def sample_seconds(self) -> float:
        """How long a sample takes, measured on part of one; 0 for recipes that show nothing."""
        return 0.0

    def draw(self, folder: Path) -> dict[str, Path]:
        """Pictures of the trained model, into the run directory -> what they show, and their paths."""
        return {}

    def notices(self) -> Sequence[str]:
        """Sentences about the data that a user should know."""
        return []

    # -- what it is ---------------------------------------------------------------------------------------------------

    def decisions(self) -> list[Decision]:
        """Lines about the data and the model, as a list of `Decision`."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """What config.json and every checkpoint say about the data and the model, as a dict."""
        raise NotImplementedError

    def check_same(self, run: Run) -> None:
        """Raise unless the data and the model are those that `run`, a `toy.files.Run`, began with."""
        raise NotImplementedError

    def has_gguf(self) -> bool:
        """Whether `write_gguf` can be called."""
        return ARCHITECTURES[self.recipe.arch].in_gguf

    def write_gguf(self, path: StrPath, parameters: Arrays) -> None:
        """Write the trained model as a GGUF file. parameters: the recipe's, by name."""
        raise NotImplementedError


class TextStart(Start):
    """What all runs on text share: a corpus, a tokenizer, windows of tokens."""

    unit = "token"

    options: TextOptions
    config: LanguageModelConfig
    tokenizer: Tokenizer

    def make_tokenizer(self) -> Tokenizer:
        """The tokenizer for training on `self.source`."""
        raise NotImplementedError

    def vocabulary(self) -> str:
        """What the vocabulary is, in words."""
        raise NotImplementedError

    def model_config(self, vocab_size: int) -> LanguageModelConfig:
        """The config of the model."""
        raise NotImplementedError

    def base(self) -> dict[str, Any]:
        """What config.json says about the model that the run begins with, besides the options; a dict."""
        return {}

    def read(self) -> None:
        o = self.options
        n_validation = o.eval_batches * o.batch * (o.context or 1)
        check_fits(16 * n_validation, f"a validation of {n_validation:,} tokens")  # ids and labels, int64
        self.source = open_source(o.corpora)
        valid = None if o.valid is None else open_source(Path(o.valid))
        self.tokenizer = self.make_tokenizer()
        self.data = TextData(
            self.source,
            self.tokenizer,
            context=cast(int, o.context),
            batch=o.rows,
            validation_batch=o.batch,
            val_fraction=o.val_fraction,
            seed=o.seed,
            valid=valid,
            train_on=o.train_on,
            split=o.split,
            progress=self.progress,
        )
        self.options = dataclasses.replace(o, corpus=self.source.path, valid=None if valid is None else valid.path)
        self.config = self.model_config(self.tokenizer.vocab_size)
        self._validation = self.data.validation_batches(o.eval_batches)
        self._prompt = self.sample_prompt()
        labels = np.concatenate([batch.labels.reshape(-1) for batch in self._validation])
        ids, counts = np.unique(labels[labels >= 0], return_counts=True)
        lengths = [len(self.tokenizer.token_bytes(i)) for i in ids.tolist()]
        self.bytes_per_token = float(np.dot(lengths, counts) / counts.sum())  # of what is validated: for bits per byte

    @property
    def per_step(self) -> int:
        return self.options.rows * cast(int, self.options.context)

    @property
    def n_train(self) -> int:
        return self.data.n_train_tokens

    @property
    def steps_per_epoch(self) -> float:
        return self.data.steps_per_epoch

    def training_batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        return self.data.training_batch(step)

    def validate(self) -> dict[str, float]:
        counts = [int((batch.labels >= 0).sum()) for batch in self._validation]
        losses = [self.recipe.evaluate(batch.token_ids, labels=batch.labels) for batch in self._validation]
        return {"loss": sum(loss * count for loss, count in zip(losses, counts)) / sum(counts)}

    def sample(self, step: int, n_tokens: int | None = None) -> str:
        o = self.options
        ids = generate(
            cast(LanguageModel, self.recipe.model_copy()),
            self._prompt,
            n_tokens or o.sample_tokens,
            temperature=o.sample_temperature,
            seed=[o.seed, step],
            stop_ids=getattr(self.tokenizer, "stop_ids", ()),
        )
        return self.tokenizer.decode(list(ids))

    def validation_seconds(self) -> float:
        batch, started = self._validation[0], time.perf_counter()
        self.recipe.evaluate(batch.token_ids, labels=batch.labels)
        return (time.perf_counter() - started) * len(self._validation)

    def sample_seconds(self) -> float:
        n = min(_SAMPLED_TOKENS, self.options.sample_tokens)
        started = time.perf_counter()
        self.sample(0, n)
        return (time.perf_counter() - started) * self.options.sample_tokens / n

    def sample_prompt(self) -> np.ndarray:
        """What a sample goes on from: what was asked for, or of examples the first prompt to validate on, of a text a new
        line. Raises ValueError for a prompt that the tokenizer has no ids for, or the chat template refuses."""
        asked, first, encoder = self.options.sample_prompt, self._validation[0], Encoder(self.tokenizer)
        if asked is not None:
            examples = self.data.family == "examples"
            conversations = examples and isinstance(next(self.source.records()), Conversation)
            ids = encoder.chat([{"role": "user", "content": asked}]) if conversations else encoder.prompt(asked)
            if not len(ids):
                raise ValueError("sample_prompt is empty: give some text, or leave it out")
            return ids
        if self.data.family == "examples":
            return first.token_ids[0, : int((first.labels[0] >= 0).argmax()) + 1]
        return first_prompt(self.tokenizer, first.token_ids[0])

    def decisions(self) -> list[Decision]:
        o, c, d = self.options, self.config, self.data
        model = f"{self.recipe.arch}: {c.n_layers} layers, {c.n_heads} heads, {c.d_model} wide, context {o.context}"
        where = "" if o.valid is None else f"{d.valid.words} to validate"
        return [
            Decision("corpus", self.source.words, "" if o.corpus else "the default; --corpus FILE names another"),
            Decision("tokens", f"{self.n_train:,} to train on, {d.n_validation_tokens:,} to validate", where),
            *self.base_decisions(),
            Decision("vocabulary", f"{c.vocab_size}", self.vocabulary()),
            Decision("model", model),
        ]

    def notices(self) -> Sequence[str]:
        return self.data.notices

    def base_decisions(self) -> list[Decision]:
        """Lines about the model the run begins with."""
        return []

    def describe(self) -> dict[str, Any]:
        corpus = self.data.describe() | {"bytes_per_token": self.bytes_per_token}
        return {"tokenizer": self.tokenizer.to_json(), **self.base(), "corpus": corpus}

    def check_same(self, run: Run) -> None:
        try:
            self.data.check_same(run.config["corpus"])
        except (KeyError, TypeError) as error:
            raise BadFileError(run.config_path, f"its training options are wrong ({error})") from error
        now = self.describe()
        if without_path(run.config.get("tokenizer")) != without_path(now["tokenizer"]):
            raise BadFileError(run.config_path, "its model or tokenizer does not fit its training options")
        if without_path(run.config.get("base")) != without_path(now.get("base")):
            model = cast(FromModelOptions, self.options).model
            raise ValueError(f"{model} is not the model that the run in {run.folder} began with")

    def write_gguf(self, path: StrPath, parameters: Arrays) -> None:
        write_gguf(path, cast(LanguageModelConfig, self.recipe.config), parameters, self.tokenizer)


class FromGGUFStart(TextStart):
    """What LoRA and full fine-tuning share: an open GGUF file with its tokenizer."""

    def __init__(self, options: FromModelOptions) -> None:
        super().__init__(options)
        path = find_model(options.model)
        refuse_pickle(path)
        if path.is_dir() and not is_model_folder(path):
            raise ValueError(
                f"{path} is a directory, {options.recipe} begins with a GGUF file or a Hugging Face folder; `toy export` "
                "writes one of a run"
            )
        self.gguf = open_model(path)  # stays open: its matrices are used in place
        self.config = self.gguf.config()
        self.check_config()
        self.tokenizer = load_tokenizer(self.gguf)
        self.options = dataclasses.replace(options, model=str(Path(path).absolute()))
        if options.context is not None and options.context > self.config.context_length:
            raise ValueError(
                f"a context of {options.context} is too long: {path} was made for at most {self.config.context_length}"
            )

    def check_config(self) -> None:
        """Raise ValueError when the recipe cannot train this model."""

    def make_tokenizer(self) -> Tokenizer:
        return self.tokenizer

    def vocabulary(self) -> str:
        return "the tokenizer in the file"

    def model_config(self, vocab_size: int) -> LanguageModelConfig:
        return self.config

    def base_decisions(self) -> list[Decision]:
        types = sorted({record.type for record in self.gguf.tensors.values()})
        return [Decision("base", str(self.gguf.path), f"{self.gguf.architecture}, {', '.join(types)}")]


def without_path(record: Any) -> Any:
    """What of a config.json's entry stays the same when a file moves."""
    return {key: value for key, value in record.items() if key != "path"} if isinstance(record, dict) else record
