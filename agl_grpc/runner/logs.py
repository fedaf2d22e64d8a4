"""The log of worker processes, in the format that the store uses too."""

from __future__ import annotations

import logging
import sys

FORMAT = "%(asctime)s [%(levelname)s] (Process-%(process)d %(name)s)   %(message)s"
LEVELS = ("debug", "info", "warning", "error")


def configure_logging(level: str) -> None:
    """Sends `agl_grpc`'s log lines of this level and above to standard error.

    Raises:
        ValueError: `level` is none of debug, info, warning and error.
    """
    if level.lower() not in LEVELS:
        raise ValueError(f"log level {level!r} is none of {', '.join(LEVELS)}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(FORMAT, datefmt="%Y-%m-%d %H:%M:%S"))
    logger = logging.getLogger("agl_grpc")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
    # Connections say each try to come back; a worker says once that the store is away.
    quiet = logging.DEBUG if level.lower() == "debug" else logging.WARNING
    logging.getLogger("agl_grpc.client").setLevel(quiet)
