"""How commands fail: one line that says what is wrong and what to do, and an exit code."""

from __future__ import annotations

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_DEFECT = 70
EXIT_INTERRUPTED = 130


class CliError(Exception):
    """A failure that the user can act on.

    Raise it anywhere inside a command: `main` prints `error: MESSAGE` on standard error, without a
    traceback, and exits with `exit_code` (1 = the command failed, 2 = it was called wrongly).
    """

    def __init__(self, message: str, *, exit_code: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code
