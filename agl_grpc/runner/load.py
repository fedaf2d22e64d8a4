"""From import paths to the user's objects."""

from __future__ import annotations

import importlib
import sys
import traceback
from typing import Any


class LoadError(Exception):
    """What an import path names cannot be used; the message says why and what to do."""


def load_object(path: str, app_dir: str | None = None) -> Any:
    """The object that `module:name` (or `module:name.attribute`) names.

    `app_dir` is put first on the import path, for modules that are not installed.

    Raises:
        LoadError: the path has another form, the import fails, or the name is not there.
    """
    module_name, separator, attributes = path.partition(":")
    if not module_name or not separator or not attributes:
        raise LoadError(f"{path!r} is not an import path: write module:name, for example my_agent:agent")
    if app_dir is not None and app_dir not in sys.path:
        sys.path.insert(0, app_dir)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise LoadError(_import_failure(module_name, error)) from error
        hint = f" (looked in {app_dir} and the installed packages)" if app_dir else ""
        raise LoadError(f"there is no module {error.name!r}{hint}") from error
    except Exception as error:
        raise LoadError(_import_failure(module_name, error)) from error
    for name in attributes.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            raise LoadError(f"module {module_name!r} has no {attributes!r}") from error
    return found


def _import_failure(module_name: str, error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"importing {module_name!r} failed: {type(error).__name__}: {error}{place}"
