"""Packages that only some features need: imported when they are, with an error that says what to install."""

import importlib
from typing import Any


def optional_package(name: str, what: str, install: str | None = None) -> Any:
    """The module `name`. what: what needs it, in words; install: what pip calls it, if not the same.

    Raises RuntimeError, with the command to type, when it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = install or name
        raise RuntimeError(
            f"{what}: this needs the package {package}; install it with: pip install {package}"
        ) from error
