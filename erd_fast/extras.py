"""Packages that not everybody needs, imported where they are used."""

import importlib
from types import ModuleType
from typing import Literal

from erd_fast.errors import ConfigError

Extra = Literal["dali", "formats", "track", "vae"]


def load(module: str, extra: Extra, needed_by: str) -> ModuleType:
    """The module called ``module``, of an extra of this package, for ``needed_by`` (a field and its value, say).

    Raises:
        ConfigError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        shared = module.startswith("nvidia.")  # a name that many packages are in
        package = module if shared else module.partition(".")[0]
        raise ConfigError(f"{needed_by}: {package} is not installed: pip install 'erd-fast[{extra}]'") from error
