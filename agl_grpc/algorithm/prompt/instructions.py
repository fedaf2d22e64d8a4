"""Texts for the critic, as templates: our own, or files of the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from agl_grpc.algorithm.errors import AlgorithmError
from agl_grpc.model import PromptTemplate

_ENGINES = {".jinja": "jinja", ".j2": "jinja", ".poml": "poml"}


def prompts_as_text(templates: Mapping[str, PromptTemplate]) -> str:
    """All prompts of a candidate, each under its name."""
    return "\n\n".join(
        f"Prompt `{name}` ({template.engine} template):\n```\n{template.template}\n```"
        for name, template in templates.items()
    )


def read_instructions(files: Sequence[str | Path] | None, own: Sequence[str]) -> list[PromptTemplate]:
    """Instructions from files (``.jinja``, ``.poml``, else f-strings), or our own when there are no files.

    Raises:
        AlgorithmError: a file cannot be read.
    """
    if not files:
        return [PromptTemplate(template=text) for text in own]
    found = []
    for file in map(Path, files):
        try:
            text = file.expanduser().read_text()
        except OSError as error:
            raise AlgorithmError(f"instructions {file} cannot be read: {error.strerror}") from error
        found.append(PromptTemplate(template=text, engine=_ENGINES.get(file.suffix, "f-string")))
    return found


def fill(template: PromptTemplate, **values: str) -> str:
    """The instruction with its places filled in.

    Raises:
        AlgorithmError: it asks for a place that we have nothing for.
    """
    try:
        return template.format(**values)
    except Exception as error:  # a user's template may fail in any way of its engine
        raise AlgorithmError(
            f"an instruction for the critic cannot be filled in ({error}); "
            f"its places may be {', '.join(values)}"
        ) from error
