"""What is wrong with a dataset."""

from __future__ import annotations


class DatasetError(ValueError):
    """A dataset cannot be read, or holds what no task can be; one line that names the place."""
