"""The grader of structured answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from agl_grpc.grader.base import Grader
from agl_grpc.grader.grade import Grade, GraderFailed
from agl_grpc.grader.library.answers import bad_reference, find_answer, look_up, right, shown, wrong
from agl_grpc.grader.submission import Submission

_MOST_ERRORS = 5


class JsonSchema(Grader):
    """The response is JSON that satisfies a schema: the whole response, else its last fenced block.

    The check is the package jsonschema's (`pip install 'agl-grpc[graders]'`); the draft is the one that the
    schema names in `$schema`, by default 2020-12. References to other documents are not followed.

    Args:
        schema: The schema; None = each task holds its own under `reference`.
        reference: Where the task holds it.
    """

    def __init__(
        self,
        schema: Mapping[str, Any] | bool | None = None,
        *,
        name: str = "json_schema",
        reference: str = "schema",
        version: str = "1",
        timeout: float = 10.0,
    ) -> None:
        super().__init__(name=name, version=version, timeout=timeout, retries=0, isolated=True)
        self.schema = schema
        self.reference = reference

    async def open(self) -> None:
        """Looks for jsonschema, and whether the schema is one."""
        _jsonschema()
        if self.schema is not None:
            _validator(self.schema)

    def grade(self, submission: Submission) -> Grade:
        """1.0 where it does; else 0.0, with the first errors and where they are in the notes."""
        schema = look_up(submission.input, self.reference) if self.schema is None else self.schema
        validator = _validator(schema)
        try:
            value = read_json(submission.response)
        except ValueError as error:
            return wrong(f"the response is not JSON: {error}")
        try:
            errors = sorted(
                validator.iter_errors(value), key=lambda error: list(map(str, error.absolute_path))
            )
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in ("referencing", "jsonschema"):
                raise
            raise bad_reference(f"refers to what is not there: {shown(error)}") from None
        if not errors:
            return right()
        said = [f"{error.json_path}: {shown(error.message)}" for error in errors[:_MOST_ERRORS]]
        return wrong("the response does not satisfy the schema", errors=said)


def read_json(response: str) -> Any:
    """The JSON value that a response is, or that stands in its last fenced block.

    Raises:
        ValueError: there is none.
    """
    try:
        return _strict(response)
    except ValueError:
        fenced = find_answer(response, "fence")
        if fenced is None:
            raise
        return _strict(fenced)


def _strict(text: str) -> Any:
    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _validator(schema: Any) -> Any:
    jsonschema = _jsonschema()
    if not isinstance(schema, Mapping | bool):
        raise bad_reference(f"is a {type(schema).__name__}, not a JSON schema")
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise bad_reference(f"is no JSON schema: {error.json_path}: {shown(error.message)}") from None
    from referencing import Registry

    return kind(schema, registry=Registry())


def _jsonschema() -> Any:
    try:
        import jsonschema
    except ImportError:
        raise GraderFailed(
            "the grader JsonSchema needs jsonschema: pip install 'agl-grpc[graders]'",
            outcome="not_installed",
            final=True,
        ) from None
    return jsonschema
