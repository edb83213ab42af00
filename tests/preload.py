"""Imported once by the server of `tests.forked`: everything that a command of vessel may need."""

import importlib

from tests.forked import MODULES

for module in MODULES:
    importlib.import_module(module)
