"""A part of a list, which behaves as the sequence of its items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, overload

T = TypeVar("T")


@dataclass(slots=True, kw_only=True)
class PaginatedResult(Sequence[T], Generic[T]):
    """Items of a query from ``offset`` on, at most ``limit`` (-1 = all), of ``total`` matches."""

    items: Sequence[T]
    limit: int
    offset: int
    total: int

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        return self.items[index]
