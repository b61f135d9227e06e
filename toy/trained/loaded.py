"""The front door: `toy.load(path)` opens whatever is there, for use."""

import numpy as np

from toy.models.generation import generate
from toy.switch import eager_ops
from toy.trained.classify import Classifier
from toy.trained.evaluate import evaluate_text
from toy.trained.load import first_prompt, read_trained, text_ids


def load(path, adapter=None, backend="auto"):
    """A model that exists, to use -> `Loaded`, or `LoadedClassifier` for an image model.

    path: a run directory, a checkpoint, a GGUF file, the name of a fetched model, or what `recipe.save` wrote. adapter: a
    LoRA adapter (GGUF) to put on it. backend: "auto", "numpy", "cython" or "ggml" (which generates on the compiled
    kernels). Raises FileNotFoundError for a path where nothing is, BadFileError for a damaged file, ValueError for one that
    does not serve.
    """
    eager_ops(backend)  # a backend that is not there is told before anything is read
    stored = read_trained(path, adapter)
    if not stored.reads_text:
        return LoadedClassifier(Classifier(path, backend))
    return Loaded(stored.model(backend), stored.tokenizer, stored)


class _Open:
    """`with toy.load(...) as model:` closes it at the end."""

    model = path = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        """Let go of the model; the file is unmapped when nothing else uses it. It cannot be used afterwards."""
        self.model = None

    def __repr__(self):
        return f"toy.load({str(self.path)!r}): {'closed' if self.model is None else repr(self.model)}"

    def _open_model(self):
        if self.model is None:
            raise RuntimeError("this model is closed: toy.load it again")
        return self.model


class Loaded(_Open):
    """A language model to use. Attributes: model, tokenizer (None where the file has none), config, path, step (of a run's
    checkpoint, None otherwise)."""

    def __init__(self, model, tokenizer, stored):
        self.model, self.tokenizer, self.config = model, tokenizer, model.config
        self.path, self.step = stored.path, stored.step

    def logits(self, token_ids):
        """token_ids: int (T,) or (B, T) -> float32 (T, vocab_size) or (B, T, vocab_size). Errors as `Model.forward`."""
        return np.asarray(self._open_model().forward(token_ids)[0], np.float32)

    def generate(self, text="", n_tokens=100, temperature=0.8, top_k=None, top_p=None, seed=0):
        """What the model writes after `text`, without it -> str. "" = a new line. temperature 0: always the likeliest token.

        It stops early at a token that ends a text, if the model has such tokens. Raises ValueError as
        `toy.models.generation`, and for a text that the tokenizer has no ids for.
        """
        model, tokenizer = self._open_model(), self._tokenizer()
        ids = text_ids(tokenizer, text, "prompt") if text else first_prompt(tokenizer, [0])
        stops = getattr(tokenizer, "stop_ids", ())
        return tokenizer.decode(list(generate(model, ids, n_tokens, temperature, top_k, top_p, seed, stops)))

    def evaluate(self, text, context=None, stride=None, limit=None):
        """How well the model predicts `text` -> `TextEvaluation` (.loss, .perplexity, .bits_per_byte, .n_tokens, ...).

        Arguments and errors as `toy.trained.evaluate.TextEvaluator`.
        """
        return evaluate_text(self._open_model(), self._tokenizer(), text, context, stride, limit)

    def _tokenizer(self):
        if self.tokenizer is None:
            raise ValueError(f"{self.path} has no tokenizer, so it can neither read a text nor write one")
        return self.tokenizer


class LoadedClassifier(_Open):
    """An image model to use. Attributes: model, config, classes (their names), path, step. tokenizer: None."""

    tokenizer = None

    def __init__(self, classifier):
        self._classifier, self.model = classifier, classifier.model
        self.config, self.classes = classifier.config, classifier.classes
        self.path, self.step = classifier.path, classifier.step

    def close(self):
        super().close()
        self._classifier = None

    def logits(self, images):
        """images: numbers from 0 to 1 (N, height, width, channels) -> float32 (N, n_classes)."""
        self._open_model()
        return self._classifier.logits(images)

    def predict(self, paths):
        """What is on each of the image files -> list of `Prediction`; errors as `Classifier.predict`."""
        self._open_model()
        return self._classifier.predict(paths)

    def evaluate(self, data=None):
        """How often it is right -> `ImageEvaluation` (.loss, .accuracy, .n_images); `data` as for `Classifier.evaluate`."""
        self._open_model()
        return self._classifier.evaluate(data)
