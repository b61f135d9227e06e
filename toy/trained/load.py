"""Models that exist already, opened for use: a run's newest checkpoint, a checkpoint file, or a GGUF file, with an adapter.

`read_trained` reads and checks the weights and leaves them as they are stored; `load_trained` makes the model of them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from toy.config import LanguageModelConfig, LlamaConfig, ModelConfig
from toy.data import tokenizer_from_json
from toy.data.encoding import Encoder
from toy.data.open_tokenizer import has_tokenizer, load_tokenizer
from toy.data.tokenizers import Tokenizer
from toy.engines.handle import NO_TOKENIZER
from toy.engines.source import borrowed_parameters
from toy.files import BadFileError, Checkpoint, Run, read_checkpoint
from toy.files.atomic import StrPath
from toy.files.gguf_write import check_adapter, digest, rank_axes
from toy.files.hugging_face import is_model_folder, open_model
from toy.files.places import find_model
from toy.files.safetensors_file import refuse_pickle
from toy.models import ARCHITECTURES, ParameterTree, architecture_of, model_for
from toy.models.base import LanguageModel, Model
from toy.models.lens import lens_shapes, without_lens
from toy.models.lora import scale_of
from toy.models.parameters import Shapes, check_arrays
from toy.quantized import Leaf, dequantized
from toy.switch import eager_ops
from toy.trained.adapters import Adapters, read_adapters, with_scales


class Stored(NamedTuple):
    """A model as it lies in its file.

    parameters: dict of names to float32 arrays and, out of a GGUF file, `toy.quantized.QuantizedMatrix`. adapters: dict of
    `blk.0.attn_q.lora_a` ... to arrays, empty without an adapter; alpha: theirs, None = the scale is in them. tokenizer: None
    where there is none.
    step: of the checkpoint, None for a GGUF file. name: what the model is called, "" where nobody said.
    base: the GGUF file that a LoRA run's adapters are for. about: the whole config of a run, empty for a GGUF file.
    in_gguf: the architecture that the GGUF file names, which may be another name for `arch`; None for a run of its own.
    """

    path: Path
    config: ModelConfig
    parameters: dict[str, Leaf]
    tokenizer: Tokenizer | None
    step: int | None = None
    adapters: dict[str, np.ndarray] = {}  # noqa: RUF012 (never changed)
    alpha: float | None = None
    name: str = ""
    base: Path | None = None
    about: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    in_gguf: str | None = None

    @property
    def arch(self) -> str:
        return architecture_of(self.config).name

    @property
    def reads_text(self) -> bool:
        return architecture_of(self.config).reads_text

    def model(self, backend: str = "auto") -> Model:
        """A model object on the eager op table of this backend. The matrices of a GGUF file stay in their own type; where the
        compiled kernels are missing they become float32, because numpy would dequantise them anew for every token."""
        ops, leaves = eager_ops(backend), self.parameters
        if ops.name == "reference":
            leaves = {name: dequantized(leaf) for name, leaf in leaves.items()}
        options: dict[str, Any] = {"lora_scale": self.lora_scale} if self.adapters else {}
        tree = ParameterTree(leaves | self.adapters)
        return model_for(self.config).from_config(self.config, ops=ops, parameters=tree, **options)

    @property
    def lora_scale(self) -> float:
        """alpha / rank, by which the adapters' product is multiplied."""
        name, lora_a = next((name, array) for name, array in self.adapters.items() if name.endswith("lora_a"))
        rank = lora_a.shape[rank_axes(name.removesuffix(".lora_a"))[0]]
        return 1.0 if self.alpha is None else self.alpha / rank


class Trained(NamedTuple):
    """A model to use, its tokenizer, and the step of its checkpoint (None for a GGUF file)."""

    model: LanguageModel
    tokenizer: Tokenizer
    step: int | None


def load_trained(
    path: StrPath, adapter: Adapters | None = None, backend: str = "auto", checkpoint: str | int = "last"
) -> Trained:
    """A model that exists, ready to generate from or to be evaluated -> `Trained`.

    path, adapter, checkpoint: as in `read_trained`.
    Raises the errors of `read_trained`; ValueError for a file without a tokenizer.
    """
    eager_ops(backend)  # a backend that is not there is told before anything is read
    stored = read_trained(path, adapter, checkpoint)
    if not stored.reads_text:
        raise ValueError(f"{stored.path} is a {stored.arch}, which reads images: toy predict is for it")
    if stored.tokenizer is None:
        raise ValueError(f"{stored.path} has no tokenizer, so it can neither read a text nor write one")
    return Trained(cast(LanguageModel, stored.model(backend)), stored.tokenizer, stored.step)


def read_trained(path: StrPath, adapter: Adapters | None = None, checkpoint: str | int = "last") -> Stored:
    """The weights, the config and the tokenizer of a model -> `Stored`.

    path: a run directory, a checkpoint file, a GGUF file, or the name of a model on this machine (`toy list`). adapter: the
    path of an adapter GGUF made for this model, several of them, or a mapping of paths to what each is multiplied by.
    checkpoint: of a run, "last", "best" (the lowest validation loss) or a step.
    Raises FileNotFoundError for a path where nothing is and for a base that is gone, BadFileError for a damaged file,
    ValueError for a sound one that does not serve: another architecture, an adapter for another base.
    """
    path = find_model(path)
    refuse_pickle(path)
    in_gguf = path.suffix == ".gguf" or is_model_folder(path) or _begins_like_gguf(path)
    if checkpoint != "last" and (in_gguf or not path.is_dir()):
        kind = "model" if path.is_dir() else "file"
        raise ValueError(
            f"{path} is one {kind}, and checkpoint {checkpoint} chooses among those of a run: leave it out"
        )
    stored = _from_gguf(path) if in_gguf else _from_run(path, checkpoint)
    adapters = with_scales(adapter)
    if not adapters:
        return stored
    names = ", ".join(str(name) for name, _ in adapters)
    if stored.adapters:
        raise ValueError(f"{path} has an adapter of its own already: leave out {names}")
    if not architecture_of(stored.config).in_gguf:
        raise ValueError(
            f"{names} cannot be put on {path}: LoRA adapters belong to a llama or a gpt2, this is a {stored.arch}"
        )
    read = read_adapters(adapters, cast(LanguageModelConfig, stored.config), stored.parameters)
    return stored._replace(adapters=read.parameters, alpha=read.alpha)


def _begins_like_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def _from_gguf(path: Path) -> Stored:
    gguf = open_model(path)  # not closed: the parameters are views of its mapping, which ends with the last of them
    config = gguf.config()
    tokenizer = load_tokenizer(gguf) if has_tokenizer(gguf) else None
    name = gguf.metadata.get("general.name")
    parameters = borrowed_parameters(gguf, config)
    name = name if isinstance(name, str) else ""
    return Stored(path, config, parameters, tokenizer, name=name, in_gguf=gguf.architecture)


def _from_run(path: Path, which: str | int) -> Stored:
    if path.is_dir():
        run = Run.open(path)
        found, base = run.read_found(which), run.config.get("base")
        if found is None:
            raise BadFileError(run.folder, "has no checkpoint yet")
        path, checkpoint = found
    else:
        checkpoint = read_checkpoint(path)
        base = checkpoint.config.get("base")
    try:
        if checkpoint.config.get("recipe") == "lora":
            return _on_its_base(path, checkpoint, base)
        if checkpoint.config["model"]["n_layers"] > len(checkpoint.parameters):
            raise ValueError("the config has more layers than there are tensors")
        config = ARCHITECTURES[checkpoint.config["arch"]].config(**checkpoint.config["model"])
        shapes, borrowed = model_for(config).parameter_shapes(config), {}
        if checkpoint.config.get("lens"):
            borrowed = _donor_embedding(base, shapes, path)
            shapes |= lens_shapes(cast(LlamaConfig, config), borrowed["token_embd.weight"].shape[1])
        elif isinstance(base, dict) and "digest" in base:
            borrowed = _left_in_base(base, shapes, checkpoint.parameters, path)
        check_arrays(shapes, checkpoint.parameters)  # before memory is asked for
        parameters, tokenizer = borrowed | checkpoint.parameters, _tokenizer_of(checkpoint, config)
        return Stored(path, config, parameters, tokenizer, checkpoint.step, about=checkpoint.config)
    except BadFileError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise BadFileError(path, f"its config and tensors are not those of a model ({error})") from error


def _tokenizer_of(checkpoint: Checkpoint, config: ModelConfig) -> Tokenizer | None:
    """The tokenizer in a checkpoint's config; None of an image model, and of a recipe that was saved without one."""
    if not architecture_of(config).reads_text or checkpoint.config["tokenizer"] == NO_TOKENIZER:
        return None
    tokenizer = tokenizer_from_json(checkpoint.config["tokenizer"])
    vocab_size = cast(LanguageModelConfig, config).vocab_size
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, the model {vocab_size}")
    return tokenizer


def _on_its_base(path: Path, checkpoint: Checkpoint, base: Any) -> Stored:
    """The model of a LoRA run: its checkpoint has the adapters, the GGUF file at base["path"] everything else."""
    lora, base_path = checkpoint.config["lora"], _path_of_base(base)
    stored = _from_gguf(base_path)
    _check_base(base_path, base, stored.parameters, path)
    kind = ARCHITECTURES[checkpoint.config["arch"]].config
    config, tokenizer = cast(LanguageModelConfig, kind(**checkpoint.config["model"])), stored.tokenizer
    own = checkpoint.config["tokenizer"]
    if own != NO_TOKENIZER and own["kind"] != "gguf":  # a recipe was saved with another one than its base has
        tokenizer = _tokenizer_of(checkpoint, config)
    shapes = {name: leaf.shape for name, leaf in stored.parameters.items()}
    if model_for(config).parameter_shapes(config) != shapes:
        raise BadFileError(base_path, f"is not the base model that {path} was trained on (its sizes are others)")
    ranks = set(check_adapter(checkpoint.parameters, config).values())
    alpha, rank = float(lora["alpha"]), lora["rank"]
    if not (alpha > 0 and ranks == {rank}):
        raise ValueError(f"adapters of rank {', '.join(map(str, sorted(ranks)))} do not fit {lora}")
    return stored._replace(
        path=path,
        config=config,
        tokenizer=tokenizer,
        step=checkpoint.step,
        adapters=dict(checkpoint.parameters),
        alpha=rank * scale_of(alpha, rank, lora.get("rslora", False)),
        base=base_path,
        about=checkpoint.config,
    )


def embedding_of(stored: Stored) -> dict[str, Leaf]:
    """What of the parameters of a `Stored` the token embedding is made of: itself and, in a run with a lens, the lens."""
    return {name: leaf for name, leaf in stored.parameters.items() if name.startswith("token_embd.")}


def _donor_embedding(base: Any, shapes: Shapes, path: Path) -> dict[str, Leaf]:
    """The embedding that a warm-started model looks at through its lens, taken out of `shapes`: it is not in the run."""
    name, base_path = "token_embd.weight", _path_of_base(base)
    del shapes[name]
    donor = read_trained(base_path)
    _check_base(base_path, base, embedding_of(donor), path)
    parameters: Mapping[str, Leaf] = donor.parameters
    if "token_embd.lens" in parameters:  # the donor looked through a lens itself
        _, parameters = without_lens(cast(LlamaConfig, donor.config), parameters)
    return {name: parameters[name]}


def _left_in_base(base: Any, shapes: Shapes, trained: Mapping[str, Leaf], path: Path) -> dict[str, Leaf]:
    """The parameters that a run borrowed from its base, all that are not among the trained ones, taken out of `shapes`."""
    base_path = _path_of_base(base)
    stored, names = read_trained(base_path).parameters, [name for name in shapes if name not in trained]
    borrowed = {name: stored[name] for name in names if name in stored}
    _check_base(base_path, base, borrowed, path)
    for name in names:
        del shapes[name]
    return borrowed


def _check_base(base_path: Path, base: Any, leaves: Mapping[str, Leaf], path: Path) -> None:
    """Raise BadFileError unless `leaves` are, byte for byte, the frozen weights that the run of checkpoint `path` used."""
    if base["digest"] != digest(leaves):
        raise BadFileError(
            base_path, f"is not the base model that {path} was trained on (its weights, or their types, are others)"
        )


def _path_of_base(base: Any) -> Path:
    path = Path(base["path"])
    if not path.exists():
        raise FileNotFoundError(
            f"the model that this run is based on is not there any more: put {path} back, "
            "or write its new path under base into the run's config.json"
        )
    return path


def first_prompt(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """What a sample begins with when nobody says: a new line, or the first token of the text when it has no lines."""
    try:
        return tokenizer.encode("\n")
    except ValueError:
        return np.asarray(ids[:1])


def text_ids(tokenizer: Tokenizer, text: str, what: str = "text") -> np.ndarray:
    """The ids of a text as the model was trained to read it: after the beginning token, if it wants one. int32 (N,).

    Errors as `encode`; `what` names the text in them.
    """
    return Encoder(tokenizer).prompt(text, what=what)


def chat_prompt(tokenizer: Tokenizer, message: str, context_length: int, system: str | None = None) -> np.ndarray:
    """The ids of a conversation with one message of the user, up to where the assistant's answer begins. system: a message
    before it, None: what the template puts there by itself.

    Raises ValueError when the model has no chat template, and for a message that leaves no room in the context.
    """
    if not hasattr(tokenizer, "apply_chat_template"):
        raise ValueError("this model has no chat template: give it plain text, without the chat option")
    messages = [] if system is None else [{"role": "system", "content": system}]
    ids = Encoder(tokenizer).chat([*messages, {"role": "user", "content": message}])
    if len(ids) >= context_length:
        raise ValueError(
            f"the message takes {len(ids)} tokens with the chat template, and the model's context is {context_length}: "
            "shorten it"
        )
    return ids
