"""Marks a piece of an agent's work as a span with its input and output."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, aclosing
from contextvars import ContextVar
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar, overload

from agl_grpc.agent.attributes import flatten
from agl_grpc.agent.context import OpenSpan, current_recorder, needed_recorder
from agl_grpc.model import semconv
from agl_grpc.model.span import SpanCoreFields

F = TypeVar("F", bound=Callable[..., Any])

_RECEIVERS = ("self", "cls")


class _Entered(NamedTuple):
    owner: OperationContext
    manager: AbstractContextManager[OpenSpan]
    span: OpenSpan


# One object may be entered many times at once, each time in a context of its own.
_entered: ContextVar[tuple[_Entered, ...]] = ContextVar("agl_grpc_operations", default=())


class OperationContext:
    """A decorator, or a context manager for one piece of work.

    The trace is looked up when the work begins, so that module-level functions can be decorated.
    """

    def __init__(self, name: str, attributes: dict[str, Any], propagate: bool) -> None:
        self._name = name
        self._attributes = attributes
        self._propagate = propagate
        self._inputs: dict[str, Any] = {}
        self._of_one_call = False
        self._only: _Entered | None = None

    def __call__(self, function: F) -> F:
        """Decorate a function, sync or async, or a generator: its arguments and result are recorded."""
        if not callable(function):
            raise TypeError(f"@operation decorates functions, and {function!r} is none")
        wrapper = _wrapper_of(function)
        signature = inspect.signature(function)
        name = self._name or getattr(function, "__qualname__", type(function).__name__)

        def begin(args: tuple[Any, ...], kwargs: dict[str, Any]) -> OperationContext:
            operation = OperationContext(name, self._attributes, self._propagate)
            given = signature.bind(*args, **kwargs).arguments
            operation._inputs = {key: value for key, value in given.items() if key not in _RECEIVERS}
            operation._of_one_call = True
            return operation

        return functools.wraps(function)(wrapper(function, begin))  # type: ignore[return-value]  # by wraps

    def __enter__(self) -> Self:
        recorder = needed_recorder("operation") if self._propagate else current_recorder()
        if recorder is not None:
            attributes = flatten({**self._attributes, semconv.OPERATION_NAME: self._name})
            manager = recorder.open_span(semconv.SPAN_OPERATION, attributes)
            self._only = _Entered(self, manager, manager.__enter__())
            _entered.set((*_entered.get(), self._only))
            if self._inputs:
                self.set_input(**self._inputs)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        entered = self._here()
        if entered is None:
            return
        _entered.set(tuple(other for other in _entered.get() if other is not entered))
        if error is not None and not isinstance(error, GeneratorExit):
            entered.span.record_exception(error)
        entered.manager.__exit__(kind, error, trace)

    @property
    def span_id(self) -> str:
        """The span's id in hex while the work is under way: what a reward can be given to."""
        return self._needed().span.span_id

    def span(self) -> SpanCoreFields:
        """The span as it is now, while the work is under way."""
        return self._needed().span.recorded()

    def set_input(self, *args: Any, **kwargs: Any) -> None:
        """Record what the work is given."""
        values = {str(place): value for place, value in enumerate(args)} | kwargs
        self._set({semconv.OPERATION_INPUT: values})

    def set_output(self, output: Any) -> None:
        """Record what the work gave."""
        self._set({semconv.OPERATION_OUTPUT: output})

    def _set(self, values: dict[str, Any]) -> None:
        entered = self._here()
        if entered is not None:
            entered.span.set_attributes(flatten(values))

    def _here(self) -> _Entered | None:
        here = next((entered for entered in reversed(_entered.get()) if entered.owner is self), None)
        # A generator may be ended in another context than it began in; its operation is entered once only.
        return here or (self._only if self._of_one_call else None)

    def _needed(self) -> _Entered:
        entered = self._here()
        if entered is None:
            raise RuntimeError("the operation is not under way here, so it has no span")
        return entered


_Begin = Callable[[tuple[Any, ...], dict[str, Any]], OperationContext]


def _wrapper_of(function: Callable[..., Any]) -> Callable[[Callable[..., Any], _Begin], Callable[..., Any]]:
    if inspect.iscoroutinefunction(function):
        return _of_coroutine
    if inspect.isasyncgenfunction(function):
        return _of_async_generator
    return _of_generator if inspect.isgeneratorfunction(function) else _of_function


def _of_function(function: Callable[..., Any], begin: _Begin) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with begin(args, kwargs) as operation:
            result = function(*args, **kwargs)
            operation.set_output(result)
            return result

    return run


def _of_coroutine(function: Callable[..., Any], begin: _Begin) -> Callable[..., Any]:
    async def run(*args: Any, **kwargs: Any) -> Any:
        with begin(args, kwargs) as operation:
            result = await function(*args, **kwargs)
            operation.set_output(result)
            return result

    return run


# The span of a generator lasts from its first item to its last; its output is what it returns.
def _of_generator(function: Callable[..., Any], begin: _Begin) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with begin(args, kwargs) as operation:
            result = yield from function(*args, **kwargs)
            operation.set_output(result)
            return result

    return run


def _of_async_generator(function: Callable[..., Any], begin: _Begin) -> Callable[..., Any]:
    async def run(*args: Any, **kwargs: Any) -> Any:
        with begin(args, kwargs):
            async with aclosing(function(*args, **kwargs)) as items:
                async for item in items:
                    yield item

    return run


@overload
def operation(fn: F, *, propagate: bool = True, name: str | None = None, **attributes: Any) -> F: ...
@overload
def operation(
    fn: None = None, *, propagate: bool = True, name: str | None = None, **attributes: Any
) -> OperationContext: ...
def operation(
    fn: F | None = None, *, propagate: bool = True, name: str | None = None, **attributes: Any
) -> F | OperationContext:
    """Mark work: ``@operation``, ``@operation(name=…)`` or ``with operation(name=…) as op:``.

    ``propagate=False`` records only where a trace is under way, instead of raising `RuntimeError` elsewhere.
    """
    context = OperationContext(name or "", attributes, propagate)
    return context if fn is None else context(fn)
