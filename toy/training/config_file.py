"""Options of a run out of a file: the config.json of a run, or TOML."""

import dataclasses
import difflib
import json
import sys
import types
import typing
from pathlib import Path
from typing import Any

from toy.files import BadFileError
from toy.training.options import RunOptions, saved_options

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def options_from_file(path: Path, kind: type[RunOptions]) -> dict[str, Any]:
    """The options in a file, by name, for the recipe of the options class `kind`.

    path: a run directory or its config.json, or a TOML file whose keys are the options' names (as the flags or with
    underscores). Raises FileNotFoundError, BadFileError for a file that is neither, ValueError for an unknown option, a value
    of another type, and the config of another recipe.
    """
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there is no file {path}: name a run's config.json or a TOML file of options"
        ) from None
    except UnicodeDecodeError as error:
        raise BadFileError(path, f"is not a text in UTF-8 ({error})") from error
    given = _from_json(path, text, kind) if path.suffix == ".json" else _from_toml(path, text, kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    options = {}
    for key, value in given.items():
        name = key.replace("-", "_")
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            raise ValueError(
                f"{path}: toy train {kind.recipe} has no option {key!r}"
                + (f", did you mean {near[0]!r}?" if near else f"; its options are {', '.join(fields)}")
            )
        options[name] = _checked(path, fields[name], value)
    return options


def _from_json(path: Path, text: str, kind: type[RunOptions]) -> dict[str, Any]:
    try:
        config = json.loads(text)
        given, recipe = saved_options(kind, config["training"]), config.get("recipe", "from-scratch")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadFileError(path, "is not the config.json of a run; options of your own are written as TOML") from error
    if recipe != kind.recipe:
        raise ValueError(f"{path} is of a run of {recipe}: toy train {recipe} --config takes it")
    return given


def _from_toml(path: Path, text: str, kind: type[RunOptions]) -> dict[str, Any]:
    try:
        given = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadFileError(path, f"is not TOML ({error})") from error
    recipe = given.pop("recipe", kind.recipe)
    if recipe != kind.recipe:
        raise ValueError(f"{path} is for {recipe}: toy train {recipe} --config takes it")
    return given


def _checked(path: Path, field: Any, value: Any) -> Any:
    """The value as the option's own type has it; raises ValueError for another type."""
    kinds = typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
    kinds = tuple(typing.get_origin(kind) or kind for kind in kinds)
    if isinstance(value, list) and tuple in kinds:
        return tuple(value)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds and int not in kinds:
        return float(value)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join("nothing" if kind is types.NoneType else kind.__name__ for kind in kinds)
        raise ValueError(f"{path}: {field.name} must be {wanted}, got {value!r}")
    return value
