"""The PEP 517 build backend: setuptools, which also requests torch to compile csrc/ with where that is needed.

setup.py compiles against the torch of the environment that installs. Where that has none, pip installs one into its
isolated build environment, several GB; an sdist needs none.
"""

import tomllib
from pathlib import Path
from typing import Any

from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

import setup

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Return the project's requirement of torch if torch is all that the extension lacks."""
    if setup.missing_tool() or setup.find_torch():
        return []
    dependencies = tomllib.loads(Path("pyproject.toml").read_text())["project"]["dependencies"]
    return [requirement for requirement in dependencies if requirement.startswith("torch>=")]


get_requires_for_build_editable = get_requires_for_build_wheel
