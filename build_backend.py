"""The build backend: setuptools', with libggml among the build requirements where there is a wheel of it for this Python.

ggml_bridge is compiled against ggml's headers, which that wheel carries. Where there is none, pip would compile all of ggml,
or fail and take the whole install with it; here the install goes on without ggml_bridge.
"""

import os
import re
from pathlib import Path

from packaging.tags import sys_tags
from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

# the wheels of libggml-python 0.20 on PyPI
WHEELS_FOR_PYTHON = {"cp310", "cp311", "cp312", "cp313", "cp314", "cp314t", "cp315", "cp315t"}
WHEELS_FOR_PLATFORM = {
    "manylinux_2_27_x86_64",
    "manylinux_2_27_aarch64",
    "musllinux_1_2_x86_64",
    "musllinux_1_2_aarch64",
    "macosx_11_0_arm64",
    "win_amd64",
}


def get_requires_for_build_wheel(config_settings=None):
    return [*build_meta.get_requires_for_build_wheel(config_settings), *ggml_requirement()]


def get_requires_for_build_editable(config_settings=None):
    return [*build_meta.get_requires_for_build_editable(config_settings), *ggml_requirement()]


def ggml_requirement():
    """The requirement of the extra `ggml` in a list; an empty one without a wheel, without kernels, or with TOY_GGML_DIR."""
    if os.environ.get("TOY_PURE_PYTHON", "") not in ("", "0") or os.environ.get("TOY_GGML_DIR"):
        return []
    if not any(tag.abi in WHEELS_FOR_PYTHON and tag.platform in WHEELS_FOR_PLATFORM for tag in sys_tags()):
        return []
    text = Path(__file__).with_name("pyproject.toml").read_text(encoding="utf-8")
    return [re.search(r'^ggml = \[\s*"([^;"]+)', text, re.M)[1].strip()]
