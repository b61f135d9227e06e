"""The front door: `toy.load(path)` opens whatever is there, for use."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar, cast

import numpy as np
import numpy.typing as npt

from toy.data.tokenizers import Tokenizer
from toy.files.atomic import StrPath
from toy.models.base import LanguageModel, Model
from toy.models.generation import Seed, generate
from toy.trained.adapters import Adapters
from toy.trained.classify import Classifier, ImageEvaluation, Prediction
from toy.trained.evaluate import TextEvaluation, evaluate_text
from toy.trained.generator import Generator, check_generator, generator
from toy.trained.load import Stored, first_prompt, read_trained, text_ids
from toy.trained.writing import Writing, check_stop, stop_ids_of

if TYPE_CHECKING:
    from typing_extensions import Self

M = TypeVar("M", bound=Model)


def load(
    path: StrPath,
    adapter: Adapters | None = None,
    backend: str = "auto",
    checkpoint: str | int = "last",
    device: str = "auto",
    precision: str = "auto",
) -> "Loaded | LoadedClassifier":
    """A model that exists, to use -> `Loaded`, or `LoadedClassifier` for an image model.

    path: a run directory, a checkpoint, a GGUF file, a Hugging Face folder, the name of a fetched model, or what
    `recipe.save` wrote. adapter: a LoRA adapter (GGUF, or a PEFT folder) to put on it, a list of several, or a dict of their
    paths to what each is multiplied by. backend: "auto", "numpy", "cython" or "ggml". checkpoint: of a run, "last", "best"
    (the lowest validation loss) or a step. device: of the backend ggml, on which `generate` runs. precision: of `generate` on
    that backend, "auto" or "f32", see `toy.trained.generator`; logits and evaluation are always float32, on the compiled
    kernels. Raises FileNotFoundError for a path where nothing is, BadFileError for a damaged file, ValueError for one that
    does not serve.
    """
    check_generator(backend, device, precision)  # a backend that is not there is told before anything is read
    stored = read_trained(path, adapter, checkpoint)
    if not stored.reads_text:
        return LoadedClassifier(Classifier(stored.path, backend))
    model = cast(LanguageModel, stored.model(backend))
    return Loaded(model, stored.tokenizer, stored, partial(generator, model, backend, device, precision))


class _Open(Generic[M]):
    """`with toy.load(...) as model:` closes it at the end."""

    model: M | None = None
    path: Path | None = None

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the model; the file is unmapped when nothing else uses it. It cannot be used afterwards."""
        self.model = None

    def __repr__(self) -> str:
        return f"toy.load({str(self.path)!r}): {'closed' if self.model is None else repr(self.model)}"

    def _open_model(self) -> M:
        if self.model is None:
            raise RuntimeError("this model is closed: toy.load it again")
        return self.model


class Loaded(_Open[LanguageModel]):
    """A language model to use. Attributes: model, tokenizer (None where the file has none), config, path, step (of a run's
    checkpoint, None otherwise)."""

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer | None, stored: Stored, how: Callable[[], Generator]
    ) -> None:
        """how: makes what `generate` runs on, when it is first called."""
        self.model, self.tokenizer, self.config = model, tokenizer, model.config
        self.path, self.step = stored.path, stored.step
        self._how: Callable[[], Generator] | None = how
        self._generator: Generator | None = None

    def close(self) -> None:
        super().close()
        if self._generator is not None:
            self._generator.close()
        self._how = self._generator = None

    @property
    def generator(self) -> Generator:
        """What `generate` runs on, and how it computes. Warns when that is not what was asked for."""
        self._open_model()
        if self._generator is None:
            self._generator = cast(Callable[[], Generator], self._how)()
            if self._generator.notice:
                warnings.warn(self._generator.notice, stacklevel=3)
        return self._generator

    def logits(self, token_ids: npt.ArrayLike) -> np.ndarray:
        """token_ids: int (T,) or (B, T) -> float32 (T, vocab_size) or (B, T, vocab_size). Errors as `Model.forward`."""
        return np.asarray(self._open_model().forward(token_ids)[0], np.float32)

    def generate(
        self,
        text: str = "",
        n_tokens: int = 100,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: Seed = 0,
        stop: Sequence[str] = (),
    ) -> str:
        """What the model writes after `text`, without it -> str. "" = a new line. temperature 0: always the likeliest token.

        It stops early at a token that ends a text, if the model has such tokens, and before the first of the texts in `stop`.
        Raises ValueError as `toy.models.generation`, for a text that the tokenizer has no ids for, and an empty stop text.
        """
        check_stop(stop)
        self._open_model()
        tokenizer = self._tokenizer()
        ids = text_ids(tokenizer, text, "prompt") if text else first_prompt(tokenizer, [0])
        stops = stop_ids_of(tokenizer, stop)
        generated = generate(self.generator.model, ids, n_tokens, temperature, top_k, top_p, seed, stops)
        return "".join(Writing(tokenizer, generated, stop))

    def evaluate(
        self,
        text: str,
        context: int | None = None,
        stride: int | None = None,
        limit: int | None = None,
        like: str | None = None,
        unknown: str = "error",
    ) -> TextEvaluation:
        """How well the model predicts `text` -> `TextEvaluation` (.loss, .perplexity, .bits_per_byte, .n_tokens, ...).

        Arguments and errors as `toy.trained.evaluate.TextEvaluator`.
        """
        return evaluate_text(self._open_model(), self._tokenizer(), text, context, stride, limit, like, unknown)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(f"{self.path} has no tokenizer, so it can neither read a text nor write one")
        return self.tokenizer


class LoadedClassifier(_Open[Model]):
    """An image model to use. Attributes: model, config, classes (their names), path, step. tokenizer: None."""

    tokenizer = None

    def __init__(self, classifier: Classifier) -> None:
        self._classifier: Classifier | None = classifier
        self.model = classifier.model
        self.config, self.classes = classifier.config, classifier.classes
        self.path, self.step = classifier.path, classifier.step

    def close(self) -> None:
        super().close()
        self._classifier = None

    def logits(self, images: npt.ArrayLike) -> np.ndarray:
        """images: numbers from 0 to 1 (N, height, width, channels) -> float32 (N, n_classes)."""
        return self._open_classifier().logits(images)

    def predict(self, paths: StrPath | Iterable[StrPath]) -> list[Prediction]:
        """What is on each of the image files -> list of `Prediction`; errors as `Classifier.predict`."""
        return self._open_classifier().predict(paths)

    def evaluate(self, data: str | None = None) -> ImageEvaluation:
        """How often it is right -> `ImageEvaluation` (.loss, .accuracy, .n_images); `data` as for `Classifier.evaluate`."""
        return self._open_classifier().evaluate(data)

    def _open_classifier(self) -> Classifier:
        self._open_model()
        return cast(Classifier, self._classifier)
