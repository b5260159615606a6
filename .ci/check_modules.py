"""Imports every module of the installed package."""

import importlib
import pkgutil
from pathlib import Path

import dentropy

assert "site-packages" in Path(dentropy.__file__).parts, f"{dentropy.__file__} is not what was installed"
names = [module.name for module in pkgutil.walk_packages(dentropy.__path__, "dentropy.")]
for name in names:
    importlib.import_module(name)
print(f"{len(names)} modules import")
