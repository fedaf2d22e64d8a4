"""Log lines of the server: time, level, process, module, text."""

from __future__ import annotations

import logging
import sys

FORMAT = "%(asctime)s [%(levelname)s] (Process-%(process)d %(name)s)   %(message)s"
"""One format for every line, as existing users of the store know it."""


def setup_logging(level: str = "INFO") -> None:
    """Send log lines of the whole process to standard error.

    Args:
        level: lowest level that is shown.

    Raises:
        ValueError: the level has no such name.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(FORMAT, datefmt="%Y-%m-%d %H:%M:%S"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
