"""Marks a piece of an agent's work as a span with its input and output."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Self, TypeVar, overload

from agl_grpc.agent.attributes import flatten
from agl_grpc.agent.context import OpenSpan, current_recorder, needed_recorder
from agl_grpc.model import semconv

F = TypeVar("F", bound=Callable[..., Any])


class OperationContext:
    """A decorator, or a context manager for one piece of work.

    The trace is looked up when the work begins, so that module-level functions can be decorated.
    """

    def __init__(self, name: str, attributes: dict[str, Any], propagate: bool) -> None:
        self._name = name
        self._attributes = attributes
        self._propagate = propagate
        # One decorated function may run many times at once.
        self._entered: ContextVar[tuple[AbstractContextManager[OpenSpan], OpenSpan] | None] = ContextVar(
            f"operation {name}", default=None
        )

    def __call__(self, function: F) -> F:
        """Decorate a function, sync or async: its arguments and result are recorded."""
        name = self._name or function.__qualname__
        signature = inspect.signature(function)

        def begin(args: tuple[Any, ...], kwargs: dict[str, Any]) -> OperationContext:
            operation = OperationContext(name, self._attributes, self._propagate)
            operation._inputs = dict(signature.bind(*args, **kwargs).arguments)
            return operation

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def run_async(*args: Any, **kwargs: Any) -> Any:
                with begin(args, kwargs) as operation:
                    result = await function(*args, **kwargs)
                    operation.set_output(result)
                    return result

            return run_async  # type: ignore[return-value]  # the same signature, by functools.wraps

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with begin(args, kwargs) as operation:
                result = function(*args, **kwargs)
                operation.set_output(result)
                return result

        return run  # type: ignore[return-value]  # the same signature, by functools.wraps

    _inputs: dict[str, Any] | None = None

    def __enter__(self) -> Self:
        recorder = needed_recorder("operation") if self._propagate else current_recorder()
        if recorder is not None:
            attributes = flatten({**self._attributes, semconv.OPERATION_NAME: self._name})
            manager = recorder.open_span(semconv.SPAN_OPERATION, attributes)
            self._entered.set((manager, manager.__enter__()))
            if self._inputs:
                self.set_input(**self._inputs)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        entered = self._entered.get()
        if entered is None:
            return
        manager, span = entered
        self._entered.set(None)
        if error is not None:
            span.record_exception(error)
        manager.__exit__(kind, error, trace)

    def set_input(self, *args: Any, **kwargs: Any) -> None:
        """Record what the work is given."""
        values = {str(place): value for place, value in enumerate(args)} | kwargs
        self._set({semconv.OPERATION_INPUT: values})

    def set_output(self, output: Any) -> None:
        """Record what the work gave."""
        self._set({semconv.OPERATION_OUTPUT: output})

    def _set(self, values: dict[str, Any]) -> None:
        entered = self._entered.get()
        if entered is not None:
            entered[1].set_attributes(flatten(values))


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
