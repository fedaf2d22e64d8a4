"""Graders: what all have, and those that are written as functions."""

from __future__ import annotations

import abc
import functools
import importlib
import inspect
from collections.abc import Awaitable, Callable
from typing import Any, overload

from agl_grpc.grader.grade import GradeValue
from agl_grpc.grader.submission import Submission
from agl_grpc.model.reward import NAME_BYTES, PRIMARY

GraderFunction = Callable[..., GradeValue | Awaitable[GradeValue]]

DEFAULT_TIMEOUT = 60.0
"""Seconds that one grade may take unless the grader says otherwise."""

DEFAULT_RETRIES = 2
"""Further tries after one that failed."""

_FORMS = (
    "(submission), or by name any of (task, response, messages, spans, submission); sync or async, "
    "and parameters with defaults are left alone"
)
_GIVEN: dict[str, Callable[[Submission], Any]] = {
    "task": lambda submission: submission.input,
    "response": lambda submission: submission.response,
    "messages": lambda submission: submission.messages,
    "spans": lambda submission: submission.spans,
    "submission": lambda submission: submission,
}


class Grader(abc.ABC):
    """Judges submissions. Subclass it with `grade` (sync or async), or decorate a function with `grader`.

    Args:
        name: The reward's name, at most 64 bytes, without `/`, `@` and spaces. `primary` is the agent's own.
        version: Changes when the verdicts may; a verdict of the same name and version is never asked for
            twice.
        timeout: Seconds that one try may take.
        retries: Further tries after one that raised or timed out; answers that are no grade are final.
        isolated: Whether it runs in processes of its own, which are killed when it hangs. None = sync
            graders do, async ones run beside others in the worker.

    Raises:
        ValueError: a name, time-out or count that cannot be.
    """

    def __init__(
        self,
        *,
        name: str,
        version: str = "1",
        timeout: float = DEFAULT_TIMEOUT,
        retries: int = DEFAULT_RETRIES,
        isolated: bool | None = None,
    ) -> None:
        _check(name, str(version), timeout, retries)
        self.name = name
        self.version = str(version)
        self.timeout = timeout
        self.retries = retries
        self.isolated = not self.is_async() if isolated is None else isolated

    @abc.abstractmethod
    def grade(self, submission: Submission) -> GradeValue | Awaitable[GradeValue]:
        """The verdict. Raise what you like, best `GraderFailed`: it is recorded as this grader's failure."""

    def is_async(self) -> bool:
        """Whether `grade` is a coroutine function."""
        return inspect.iscoroutinefunction(self.grade)

    async def open(self) -> None:  # noqa: B027  # nothing to do for most
        """Called once in the worker before the first grade, for example to look for what is needed.

        Raises:
            GraderFailed: it can never grade; the message says what to do.
        """

    async def close(self) -> None:  # noqa: B027  # nothing to do for most
        """Called once in the worker after the last grade."""

    @property
    def id(self) -> str:
        """Name and version, as `name@version`."""
        return f"{self.name}@{self.version}"


class FunctionGrader(Grader):
    """A grader made of one function, which stays callable as it was written."""

    def __init__(
        self,
        function: GraderFunction,
        *,
        name: str | None = None,
        version: str = "1",
        timeout: float = DEFAULT_TIMEOUT,
        retries: int = DEFAULT_RETRIES,
        isolated: bool | None = None,
    ) -> None:
        self._parameters = _parameters(function)
        self._function = function
        super().__init__(
            name=name or str(getattr(function, "__name__", type(function).__name__)),
            version=version,
            timeout=timeout,
            retries=retries,
            isolated=isolated,
        )
        functools.update_wrapper(self, function, updated=())

    def __reduce__(self) -> tuple[Callable[[str, str], Any], tuple[str, str]]:
        # The name in the module stands for the grader, not for the function inside it.
        module, name = str(getattr(self, "__module__", "")), str(getattr(self, "__qualname__", self.name))
        if import_grader(module, name) is not self:
            raise ValueError(_not_importable(module, name))
        return import_grader, (module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function itself."""
        return self._function(*args, **kwargs)

    def is_async(self) -> bool:
        """Whether the function is async."""
        call = getattr(type(self._function), "__call__", None)  # noqa: B004  # an object may be a grader too
        return inspect.iscoroutinefunction(self._function) or inspect.iscoroutinefunction(call)

    def grade(self, submission: Submission) -> GradeValue | Awaitable[GradeValue]:
        """Call the function with what its parameters name."""
        if self._parameters is None:
            return self._function(submission)
        return self._function(**{name: _GIVEN[name](submission) for name in self._parameters})


@overload
def grader(function: GraderFunction) -> FunctionGrader: ...
@overload
def grader(
    function: None = None,
    *,
    name: str | None = None,
    version: str = "1",
    timeout: float = DEFAULT_TIMEOUT,
    retries: int = DEFAULT_RETRIES,
    isolated: bool | None = None,
) -> Callable[[GraderFunction], FunctionGrader]: ...
def grader(
    function: GraderFunction | None = None,
    *,
    name: str | None = None,
    version: str = "1",
    timeout: float = DEFAULT_TIMEOUT,
    retries: int = DEFAULT_RETRIES,
    isolated: bool | None = None,
) -> FunctionGrader | Callable[[GraderFunction], FunctionGrader]:
    """Make a function a grader: `(submission)`, or by name any of `task`, `response`, `messages`, `spans`.

    It answers a number, a bool, a `Grade` or a mapping of named components. For the other arguments see
    `Grader`; `name` is the function's own unless given.

    Raises:
        TypeError: any other signature; the message lists the legal ones.
        ValueError: a name, time-out or count that cannot be.
    """

    def decorate(target: GraderFunction) -> FunctionGrader:
        return FunctionGrader(
            target, name=name, version=version, timeout=timeout, retries=retries, isolated=isolated
        )

    return decorate if function is None else decorate(function)


def import_grader(module: str, name: str) -> Any:
    """Find a grader by its module and name, in a process that it is handed to.

    Raises:
        ValueError: no import can find it, for example one that was made inside a function.
    """
    found: Any = importlib.import_module(module)
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError:
        raise ValueError(_not_importable(module, name)) from None
    return found


def _not_importable(module: str, name: str) -> str:
    return (
        f"grader {module}:{name} cannot be imported by its own process; define it at the top of a module, "
        "or give it isolated=False"
    )


def _parameters(function: GraderFunction) -> tuple[str, ...] | None:
    """Names of the parameters that are given something; None = one positional, the submission."""
    rule = f"cannot be a grader; allowed: {_FORMS}"
    if not callable(function):
        raise TypeError(f"{function!r} {rule}")
    name = getattr(function, "__name__", type(function).__name__)
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(f"{name} is a generator, which {rule}")
    try:
        every = inspect.signature(function).parameters.values()
    except ValueError:  # some built-in functions have none
        raise TypeError(f"{name} has no signature, which {rule}") from None
    named = [p for p in every if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    required = [p for p in named if p.default is p.empty]
    if (
        len(required) == 1
        and required[0].name not in _GIVEN
        and required[0].kind is not required[0].KEYWORD_ONLY
    ):
        return None
    given = tuple(p.name for p in named if p.name in _GIVEN)
    positional = any(p.kind is p.POSITIONAL_ONLY for p in required)
    if not given or positional or any(p.name not in _GIVEN for p in required):
        raise TypeError(f"{name}({', '.join(p.name for p in named)}) {rule}")
    return given


def _check(name: str, version: str, timeout: float, retries: int) -> None:
    limit = NAME_BYTES // 2  # the other half is for the component's name
    if not name or len(name.encode()) > limit or any(c in "/@,=:" or c.isspace() for c in name):
        raise ValueError(
            f"grader name {name!r} must be 1 to {limit} bytes without '/', '@', ',', '=', ':' and spaces"
        )
    if name == PRIMARY:
        raise ValueError(f"a grader cannot be named {PRIMARY!r}: that is the reward of the agent itself")
    if not version or len(version.encode()) > NAME_BYTES or any(c in "@," or c.isspace() for c in version):
        raise ValueError(
            f"version {version!r} of grader {name} must be 1 to {NAME_BYTES} bytes without '@', ',', spaces"
        )
    if not 0 < timeout < float("inf"):
        raise ValueError(f"timeout of grader {name} is {timeout}; it must be a positive number of seconds")
    if not 0 <= retries <= 100:
        raise ValueError(f"retries of grader {name} is {retries}; it must be 0 to 100")
