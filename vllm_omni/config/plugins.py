"""Modules that add rows to the registry: those that a config names, and those that installed packages announce.

They are trusted because the user names or installs them. Nothing of a checkpoint can name one.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Sequence
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

from vllm_omni.errors import ConfigError, OmniError
from vllm_omni.utils.checks import brief

GROUP = "vllm_omni"  # of entry points, each a module that registers when it is imported, or a function that does

logger = logging.getLogger(__name__)


def import_modules(names: Sequence[str], folder: Path | None) -> None:
    """Imports each module. One that Python does not find may stand in the config's own folder. ConfigError where that
    cannot be.
    """
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(f"import: got {brief(name)}, expected the name of a module such as my_package.stages")
        try:
            _find_beside(name, folder)
            import_module(name)
        except OmniError as error:
            raise ConfigError(f"import: {name}: {error}") from error
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            fix = "install it, or put it beside the config"
            raise ConfigError(f"import: got {brief(name)}, which cannot be imported ({reason}); {fix}") from error


@functools.cache
def load_entry_points() -> None:
    """Once in a process. A package whose entry point does not load is left out, with a warning."""
    for entry in metadata.entry_points(group=GROUP):
        try:
            loaded = entry.load()
            if callable(loaded):
                loaded()
        except Exception as error:
            logger.warning(
                "entry point %s = %s: left out (%s: %s)", entry.name, entry.value, type(error).__name__, error
            )


def _find_beside(name: str, folder: Path | None) -> None:
    top = name.partition(".")[0]
    if folder is not None and top not in sys.modules and find_spec(top) is None:
        sys.path.append(str(folder))  # last, so that it hides nothing
