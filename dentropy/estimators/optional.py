"""Packages that only some functions need: imported when such a function is called."""

from __future__ import annotations

import importlib
from types import ModuleType


def load(module: str, purpose: str) -> ModuleType:
    """The module; ImportError naming what to install where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0].replace("_", "-")
        raise ImportError(f'{purpose} needs {package}: pip install "dentropy[probe]"') from error
