"""Models that exist already, opened for use: the newest checkpoint of a run, or a checkpoint file."""

from pathlib import Path
from typing import NamedTuple

from toy.data import tokenizer_from_json
from toy.engines import model_from
from toy.files import BadFileError, Run, read_checkpoint
from toy.models import MODELS
from toy.models.parameters import check_arrays

CONFIGS = {model.arch: config for config, model in MODELS.items()}  # "transformer", "gpt2", ...


class Trained(NamedTuple):
    """A model that was trained, its tokenizer and the step of its checkpoint."""

    model: object
    tokenizer: object
    step: int


def load_trained(path, backend="auto"):
    """The newest checkpoint of a run directory, or the checkpoint file itself, as a model to generate from -> `Trained`.

    Raises BadFileError when there is none or it is damaged, FileNotFoundError for a path where nothing is.
    """
    path = Path(path)
    if path.is_dir():
        run = Run.open(path)
        checkpoint, path = run.read_checkpoint(), run.latest_checkpoint()
        if checkpoint is None:
            raise BadFileError(run.folder, "has no checkpoint yet")
    elif path.exists():
        checkpoint = read_checkpoint(path)
    else:
        raise FileNotFoundError(f"there is no run directory or checkpoint file {str(path)!r}")
    try:
        if checkpoint.config["model"]["n_layers"] > len(checkpoint.parameters):
            raise ValueError("the config has more layers than there are tensors")
        config = CONFIGS[checkpoint.config["arch"]](**checkpoint.config["model"])
        check_arrays(MODELS[type(config)].parameter_shapes(config), checkpoint.parameters)  # before memory is asked for
        tokenizer = tokenizer_from_json(checkpoint.config["tokenizer"])
        if tokenizer.vocab_size != config.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}")
        return Trained(model_from(config, checkpoint.parameters, backend=backend), tokenizer, checkpoint.step)
    except (KeyError, TypeError, ValueError) as error:
        raise BadFileError(path, f"its config and tensors are not those of a model ({error})") from error


def first_prompt(tokenizer, ids):
    """What a sample begins with when nobody says: a new line, or the first token of the text when it has no lines."""
    try:
        return tokenizer.encode("\n")
    except ValueError:
        return ids[:1]
