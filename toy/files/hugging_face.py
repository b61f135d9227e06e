"""A Hugging Face model folder, opened as the GGUF file that it could be converted to.

The weights stay in their `.safetensors` files, mapped: a matrix in float16 or bfloat16 is used as it lies there. What differs
between the two worlds is put right as a tensor is read, and only there: names; the order of the rows of queries and keys
(RoPE of transformers turns the pairs (i, i + d_head/2), that of GGUF's llama (2i, 2i+1)); the matrices of GPT-2, which lie
(in, out); the gains of Gemma, which transformers stores less 1.
"""

import contextlib
import fnmatch
import mmap
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from toy.config import LanguageModelConfig
from toy.files import gguf_models
from toy.files.atomic import StrPath
from toy.files.errors import BadFileError
from toy.files.gguf import GGUF, TensorRecord
from toy.files.gguf_models import UnsupportedModelError, short
from toy.files.hugging_face_config import Family, read_config
from toy.files.safetensors_file import DTYPES, PICKLES, StoredTensor, map_safetensors, read_json, shown
from toy.quantized import dequantize

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_MAX_SHARDS = 999
_SHARD = re.compile(r"[\w-][\w.-]*\.safetensors", re.ASCII)
# tables that old versions of transformers stored, and make anew
_TABLES = re.compile(r".*\.(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)")

Change = Callable[[np.ndarray], np.ndarray]  # of the bytes of a tensor as they lie -> as GGUF has them


def is_model_folder(path: Path) -> bool:
    """Whether a path is a folder with a Hugging Face model, or with what is left of one. A run's folder is none."""
    if not path.is_dir() or (path / "events.jsonl").exists():
        return False
    names = {entry.name for entry in path.iterdir()}
    if INDEX in names or any(name.endswith((".safetensors", *PICKLES)) for name in names):
        return True
    if CONFIG not in names:
        return False
    try:
        return "model_type" in read_json(path / CONFIG)
    except (BadFileError, OSError):
        return False


def open_model(path: StrPath) -> GGUF:
    """An open model: a GGUF file, or a Hugging Face model folder. Errors as `GGUF.open` and `HuggingFaceModel.open`."""
    path = Path(path)
    return HuggingFaceModel.open(path) if is_model_folder(path) else GGUF.open(path)


class HuggingFaceModel(GGUF):
    """An open model folder: `config.json`, and the weights in `model.safetensors` or in the files that
    `model.safetensors.index.json` names. It is used as a `GGUF`: the same names, shapes and order of rows.

    family: the `Family` of its `model_type`.
    """

    family: Family
    _config: LanguageModelConfig
    _changes: Mapping[str, Change]

    @classmethod
    def open(cls, path: StrPath) -> "HuggingFaceModel":
        """Map the weights of the folder `path`, and check that they are the model that its config describes.

        Raises FileNotFoundError where there is no folder, BadFileError for files that are damaged, missing or contradict each
        other, UnsupportedModelError for sound ones of a model that this library does not have, and for pickles.
        """
        path = Path(path)
        if (path / "adapter_config.json").exists() and not (path / CONFIG).exists():
            raise UnsupportedModelError(
                f"{path} is an adapter of PEFT: give its base as the model, and it as the adapter"
            )
        if not (path / CONFIG).exists():
            raise BadFileError(path, f"has no {CONFIG}, which says what model it is")
        files = weight_files(path)
        config, family = read_config(path / CONFIG)
        mapped: list[mmap.mmap] = []
        try:
            stored: dict[str, tuple[int, StoredTensor]] = {}
            for part, file in enumerate(files):
                mapping, tensors = map_safetensors(file)
                mapped.append(mapping)
                for name, tensor in tensors.items():
                    if name in stored:
                        raise BadFileError(
                            file, f"has the tensor {shown(name)}, which another file of the model has already"
                        )
                    stored[name] = part, tensor
            _check_index(path, stored)
            records, parts, changes = _translate(path, config, family, stored, mapped)
        except BaseException:
            for mapping in mapped:
                with contextlib.suppress(BufferError):
                    mapping.close()
            raise
        metadata = gguf_models.metadata_of(config) | {"general.type": "model", "general.name": path.resolve().name}
        metadata["general.architecture"] = family.form
        model = cls(path, mapped, metadata, records, parts)
        model.family, model._config, model._changes = family, config, changes
        return model

    def config(self) -> LanguageModelConfig:
        """The config that `config.json` means."""
        return self._config

    @property
    def ends(self) -> list[int]:
        """The ids that end an answer by `generation_config.json`, or else by `config.json`."""
        for name in ("generation_config.json", CONFIG):
            said = read_json(self.path / name).get("eos_token_id") if (self.path / name).exists() else None
            ids = said if isinstance(said, list) else [said]
            if ids := [i for i in ids if type(i) is int]:
                return ids
        return []

    def raw(self, name: str) -> np.ndarray:
        """As `GGUF.raw`: the bytes in the file where they lie as GGUF has them, else a copy."""
        data = super().raw(name)
        if name in self._changes:
            data = np.ascontiguousarray(self._changes[name](data))
            data.flags.writeable = False
        elif data.ctypes.data % 4:  # a file that was not made with this in mind
            data = data.copy()
            data.flags.writeable = False
        return data


def hugging_face_name(name: str, family: Family) -> str:
    """The name in a Hugging Face model of a parameter of this library."""
    stem, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if layer is None:
        return f"{next(theirs for theirs, ours in family.outside.items() if ours == stem)}.{kind}"
    module = next(theirs for theirs, ours in family.modules.items() if ours == layer[2])
    return f"{family.layers}.{layer[1]}.{module}.{kind}"


def rows_of_pairs(n_rows: int, n_heads: int, to_gguf: bool = True) -> np.ndarray:
    """Which row of a matrix in the one order stands where in the other -> int (n_rows,).

    transformers' heads have the first numbers of all pairs, then the second ones; GGUF's have pair after pair.
    """
    order = (n_heads, 2, n_rows // n_heads // 2) if to_gguf else (n_heads, n_rows // n_heads // 2, 2)
    return np.arange(n_rows).reshape(order).swapaxes(1, 2).ravel()


def permuted_heads(name: str, config: LanguageModelConfig, family: Family) -> int | None:
    """The heads whose rows of this parameter stand in another order in GGUF, None where none do."""
    stem = name.rsplit(".", 2)[-2]
    if not family.permuted or stem not in ("attn_q", "attn_k"):
        return None
    return config.n_heads if stem == "attn_q" else getattr(config, "n_kv_heads", config.n_heads)


def is_transposed(name: str, family: Family) -> bool:
    """Whether this parameter's matrix lies (in, out) in a Hugging Face model."""
    return family.conv1d and fnmatch.fnmatchcase(name, "blk.*.weight") and not name.endswith("norm.weight")


def is_less_one(name: str, family: Family) -> bool:
    """Whether a Hugging Face model stores this parameter less 1."""
    return family.plus_one and name.endswith("norm.weight")


# -- the files ---------------------------------------------------------------------------------------------------------


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that hold the model in a folder. As in transformers one file goes before several.

    Raises BadFileError where they are missing, UnsupportedModelError for pickles.
    """
    if (path / WEIGHTS).exists():
        return [path / WEIGHTS]
    if (path / INDEX).exists():
        names = sorted(set(_weight_map(path).values()))
        for i, name in enumerate(names):
            if not (path / name).exists():
                raise BadFileError(
                    path / name,
                    f"is missing: by {INDEX} the model consists of {len(names)} files, this is number {i + 1}",
                )
        return [path / name for name in names]
    pickles = sorted(entry.name for entry in path.iterdir() if entry.suffix in PICKLES)
    if pickles:
        raise UnsupportedModelError(
            f"{path} holds its weights in a pickle ({pickles[0]}), which can run any program when it is read, so it is not "
            "opened: convert it to safetensors, where you trust it, with transformers' from_pretrained and save_pretrained"
        )
    raise BadFileError(path, f"has neither {WEIGHTS} nor {INDEX}: the weights are missing")


def _weight_map(path: Path) -> dict[str, str]:
    """dict of tensors to the names of files beside the index: names alone, no paths that lead anywhere else."""
    index = path / INDEX
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise BadFileError(index, "has no weight_map")
    for name in names.values():
        if not isinstance(name, str) or _SHARD.fullmatch(name) is None:
            raise BadFileError(
                index, f"names the file {shown(str(name))}, expected the name of a .safetensors file beside it"
            )
    if len(set(names.values())) > _MAX_SHARDS:
        raise BadFileError(index, f"names {len(set(names.values()))} files, more than any model ({_MAX_SHARDS})")
    return names


def _check_index(path: Path, stored: Mapping[str, Any]) -> None:
    if (path / WEIGHTS).exists():
        return
    for name, file in _weight_map(path).items():
        if name not in stored:
            raise BadFileError(path / file, f"has no tensor {shown(name)}, which {INDEX} says is in it")


def _translate(
    path: Path,
    config: LanguageModelConfig,
    family: Family,
    stored: Mapping[str, tuple[int, StoredTensor]],
    mapped: list[mmap.mmap],
) -> tuple[dict[str, TensorRecord], dict[str, int], dict[str, Change]]:
    """The tensors as a GGUF file would have them: records, the file that each is in, and what is changed in reading."""
    prefix = family.layers.partition(".")[0] + "."  # a model that was saved without its output matrix lacks it
    records: dict[str, TensorRecord] = {}
    parts: dict[str, int] = {}
    changes: dict[str, Change] = {}
    used = set()
    for name, shape in gguf_models.parameter_shapes(config).items():
        theirs = hugging_face_name(name, family)
        found = theirs if theirs in stored else theirs.removeprefix(prefix)
        if found not in stored:
            raise BadFileError(path, f"has no tensor {theirs}")
        used.add(found)
        part, tensor = stored[found]
        if tensor.dtype not in DTYPES:
            raise UnsupportedModelError(
                f"{path}: tensor {found} is of the type {short(tensor.dtype)}; weights of {', '.join(DTYPES)} can be used"
            )
        transposed = is_transposed(name, family)
        lies = shape[::-1] if transposed else shape
        if tensor.shape != lies:
            raise BadFileError(path, f"tensor {found} has shape {tensor.shape}, expected {lies}")
        kind = "F32" if is_less_one(name, family) else tensor.dtype
        records[name], parts[name] = TensorRecord(name, shape, kind, tensor.n_bytes, tensor.offset), part
        heads = permuted_heads(name, config, family)
        if transposed:
            changes[name] = _transposing(lies, DTYPES[tensor.dtype])
        elif is_less_one(name, family):
            changes[name] = _plus_one(tensor.dtype)
        elif heads is not None:
            changes[name] = _permuting(shape[0], heads)
    others = [name for name in stored if name not in used and _TABLES.fullmatch(name) is None]
    tied = stored.get("lm_head.weight")
    if tied is not None and "output.weight" not in records and "lm_head.weight" in others:
        part, embedding = parts["token_embd.weight"], records["token_embd.weight"]
        if not np.array_equal(_bytes(mapped[tied[0]], tied[1]), _bytes(mapped[part], embedding)):
            raise UnsupportedModelError(
                f"{path} has an lm_head.weight other than its embedding, and tie_word_embeddings says that they are one"
            )
        others.remove("lm_head.weight")
    if others:
        raise UnsupportedModelError(
            f"{path} has tensors that this library's {family.form} has no place for: "
            + ", ".join(shown(name) for name in others[:3])
            + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        )
    return records, parts, changes


def _bytes(mapped: mmap.mmap, tensor: StoredTensor | TensorRecord) -> np.ndarray:
    return np.frombuffer(mapped, np.uint8)[tensor.offset : tensor.offset + tensor.n_bytes]


def _transposing(lies: tuple[int, ...], n_bytes: int) -> Change:
    def change(data: np.ndarray) -> np.ndarray:
        columns = data.reshape(*lies, n_bytes).swapaxes(0, 1)  # (out, in, bytes)
        return np.ascontiguousarray(columns).reshape(lies[1], -1)

    return change


def _permuting(n_rows: int, n_heads: int) -> Change:
    rows = rows_of_pairs(n_rows, n_heads)
    return lambda data: data.reshape(n_rows, -1)[rows].reshape(data.shape)


def _plus_one(dtype: str) -> Change:
    def change(data: np.ndarray) -> np.ndarray:
        numbers = np.empty((1, data.size // DTYPES[dtype]), np.float32)
        dequantize(data.reshape(1, -1), dtype, numbers)
        return (numbers + np.float32(1)).reshape(-1).view(np.uint8)

    return change
