"""What a search for better prompts has done, from its journal."""

from __future__ import annotations

from collections.abc import Sequence

from agl_grpc.algorithm.prompt.candidate import Candidate
from agl_grpc.algorithm.prompt.journal import AlgorithmRecord


def version_rows(records: Sequence[AlgorithmRecord]) -> list[tuple[str, ...]]:
    """A row for each version: name, parent, changed prompt, score on a batch, score on the dataset,
    tokens of its critique and edit, and why it could not be used.
    """
    scores: dict[str, dict[str, str]] = {}
    tokens: dict[str, int] = {}
    for record in records:
        data = record.data
        if record.kind in ("score", "full score"):
            scores.setdefault(data["version"], {})[record.kind] = f"{data['score']:.3f}"
        if "usage" in data and "version" in data:
            usage = data["usage"]
            used = int(usage["prompt_tokens"]) + int(usage["completion_tokens"])
            tokens[data["version"]] = tokens.get(data["version"], 0) + used
    rows: list[tuple[str, ...]] = []
    for record in records:
        if record.kind != "candidate":
            continue
        data = record.data
        known = scores.get(data["version"], {})
        rows.append(
            (
                data["version"],
                "+".join(filter(None, (data["parent"], data.get("other_parent")))) or "-",
                data["changed"] or "-",
                known.get("score", "-"),
                known.get("full score", "-"),
                str(tokens.get(data["version"], 0)),
                data.get("problem") or "",
            )
        )
    return rows


def best_candidate(records: Sequence[AlgorithmRecord]) -> Candidate | None:
    """The best version as far as the search has come; None before a version was scored."""
    version = ""
    for record in records:
        if record.kind in ("round", "end"):
            version = record.data["best"]
    version = version or next((r.data["version"] for r in records if r.kind == "full score"), "")
    found = [r.data for r in records if r.kind == "candidate" and r.data["version"] == version]
    return Candidate.from_data(found[-1]) if found else None
