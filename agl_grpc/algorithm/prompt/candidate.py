"""Candidates: the prompts of an agent, each under its resource name, as one version."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from agl_grpc.algorithm.errors import AlgorithmError
from agl_grpc.model import NamedResources, PromptTemplate

_POML_PLACE = re.compile(r"\{\{\s*([A-Za-z_]\w*)")


@dataclass(frozen=True)
class Candidate:
    """A version of all prompts that are improved together.

    Attributes:
        version: its name, ``v0`` for the prompts that the run begins with.
        templates: by resource name.
        parent: the version that it was made of; None for the first.
        changed: the name of the prompt that differs from the parent's.
    """

    version: str
    templates: Mapping[str, PromptTemplate]
    parent: str | None = None
    changed: str | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    def to_data(self) -> dict[str, Any]:
        """As plain values, for the journal."""
        templates = {
            name: {"template": template.template, "engine": template.engine}
            for name, template in self.templates.items()
        }
        return {
            "version": self.version,
            "parent": self.parent,
            "changed": self.changed,
            "templates": templates,
            **self.notes,
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Candidate:
        """From the journal's values."""
        known = {"version", "parent", "changed", "templates"}
        return cls(
            version=data["version"],
            parent=data["parent"],
            changed=data["changed"],
            templates={name: PromptTemplate(**fields) for name, fields in data["templates"].items()},
            notes={key: value for key, value in data.items() if key not in known},
        )

    def with_text(self, version: str, name: str, text: str, notes: Mapping[str, Any]) -> Candidate:
        """A child in which one prompt has another text."""
        changed = PromptTemplate(template=text, engine=self.templates[name].engine)
        return Candidate(version, {**self.templates, name: changed}, self.version, name, notes)


def first_candidate(resources: NamedResources) -> Candidate:
    """The prompts that a run begins with.

    Raises:
        AlgorithmError: there are none.
    """
    templates = {
        name: resource for name, resource in resources.items() if isinstance(resource, PromptTemplate)
    }
    if not templates:
        named = f" (there are: {', '.join(resources)})" if resources else ""
        raise AlgorithmError(
            f"no prompt to improve: initial_resources must hold a PromptTemplate{named}; for example "
            'initial_resources={"prompt_template": PromptTemplate(template="Answer: {question}")}'
        )
    return Candidate("v0", templates)


def places(template: PromptTemplate) -> set[str]:
    """Names that a template has filled in.

    Raises:
        ValueError: it is no template of its engine.
    """
    text = template.template
    if template.engine == "jinja":
        return _jinja_places(text)
    if template.engine == "poml":
        if text.count("<") != text.count(">"):
            raise ValueError("its tags are not balanced")
        return set(_POML_PLACE.findall(text))
    parsed = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    if any(not name or name.isdecimal() for name in parsed):
        raise ValueError("it has places without a name, {}: write literal braces as {{ and }}")
    return {re.split(r"[.\[]", name)[0] for name in parsed}


def _jinja_places(text: str) -> set[str]:
    try:
        import jinja2
        from jinja2 import meta
    except ImportError:
        raise AlgorithmError("jinja templates need jinja2: pip install 'agl-grpc[apo]'") from None
    try:
        return set(meta.find_undeclared_variables(jinja2.Environment(autoescape=False).parse(text)))
    except jinja2.TemplateError as error:
        raise ValueError(str(error)) from error


def problem_of(text: str, replaced: PromptTemplate) -> str:
    """Why a text cannot take a template's place; empty = it can."""
    if not text.strip():
        return "it is empty"
    try:
        found = places(PromptTemplate(template=text, engine=replaced.engine))
    except ValueError as error:
        return f"it is no {replaced.engine} template: {error}"
    wanted = places(replaced)
    if lost := sorted(wanted - found):
        return f"it lost the places {', '.join(lost)}"
    if new := sorted(found - wanted):
        return f"it has places that nobody fills: {', '.join(new)}"
    return ""
