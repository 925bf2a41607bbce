"""What rlopt raises for a mistake of the user's. Apart from ``rlopt.types``, so that saying what is wrong needs no
torch."""

from __future__ import annotations

import importlib
from typing import Any


class RloptError(Exception):
    """A mistake of the user's, told in one clear line that names the fix. The command line prints it and exits with
    2."""


def needed(module: str, extra: str, what: str) -> Any:
    """Import a module of an optional package.

    Raises:
        RloptError: it is not installed; the message says how it is.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        from rlopt.version import install

        package = module.partition(".")[0]
        raise RloptError(f"{what} needs {package} ({error}); install it {install(extra)}") from error
