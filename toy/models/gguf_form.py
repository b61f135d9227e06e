"""How GGUF files say which model they hold: a `Form` is one architecture of GGUF, a `Key` one metadata key of it.

The forms of a model stand in its own file (`GGUF_FORMS`), the first of them is the one it is written in;
`toy/files/gguf_models.py` reads and writes by them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

REQUIRED = object()


class Key(NamedTuple):
    """A metadata key, named without the architecture in front, that says a field of the config.

    number: a number above 0; words: one of these; otherwise a whole number above 0. default: what it means when the key is
    missing: a value, or a function of the dict of the fields before it, which raises ValueError when it has none. zero: a 0
    means the default too. says: of a key that says a field once more: how the field is called in the error when it says
    something else. unless: a function of the config: the key is left out of files for which it is true. formerly: what it was
    called in old files, read where the key itself is missing.
    """

    field: str
    key: str
    number: bool = False
    default: Any = REQUIRED
    says: str = ""
    unless: Callable[[Any], bool] = lambda config: False
    words: tuple[str, ...] = ()
    zero: bool = False
    formerly: str = ""


class Form(NamedTuple):
    """One architecture of GGUF, which a model of this library computes.

    name: its `general.architecture`. keys: all that say a field of the config, but the size of the vocabulary, which every
    form has. tensors: fields of the config -> a shell pattern; the field is True when there is a tensor of such a name.
    vectors: fields of the config -> the tensor whose numbers they are; without it they are None. fixed: fields of the config
    that are the same in all its files. constants: keys of numbers that the model's own code has. harmless: keys that change
    what llama.cpp computes, or are meant to, and the values with which they do not; a missing key means the first. only: a
    function of the config: whether llama.cpp reads such a model in this form. typical: fields of the config in a model of
    this name from random weights, beside those of `fixed` (None: it has no name of its own there). longest: a function of
    what looks up a key (None: missing): the longest context for which this library computes what llama.cpp does, or None.
    derived: fields of the config -> functions of it: what they are in this form.
    """

    name: str
    keys: tuple[Key, ...]
    tensors: dict[str, str] = {}  # noqa: RUF012 (never changed)
    fixed: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    constants: dict[str, float] = {}  # noqa: RUF012 (never changed)
    harmless: dict[str, tuple[Any, ...]] = {}  # noqa: RUF012 (never changed)
    vectors: dict[str, str] = {}  # noqa: RUF012 (never changed)
    only: Callable[[Any], bool] = lambda config: True
    typical: dict[str, Any] | None = None
    derived: dict[str, Callable[[Any], Any]] = {}  # noqa: RUF012 (never changed)
    longest: Callable[[Callable[[str], Any]], int | None] = lambda get: None


# what every language model is made of
SIZES = (
    Key("context_length", "context_length"),
    Key("d_model", "embedding_length"),
    Key("n_layers", "block_count"),
    Key("d_ff", "feed_forward_length"),
    Key("n_heads", "attention.head_count"),
)

# what changes a Llama in llama.cpp, or is meant to, and is not in this library. What llama.cpp reads of other architectures
# only (attention.sliding_window, logit_scale, ...) is no matter in a file of one that this library has.
PLAIN: dict[str, tuple[Any, ...]] = {
    "nextn_predict_layers": (0,),
    "attention.causal": (True,),
}
# scaled RoPE, for forms that have none
UNSCALED: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none", "linear", "yarn"),
    "rope.scaling.factor": (0, 1),
    "rope.scale_linear": (0, 1),
}
