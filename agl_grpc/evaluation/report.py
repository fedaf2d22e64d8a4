"""The report of an evaluation, or of two compared: Markdown with pictures beside it, and one HTML file."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from agl_grpc.evaluation.comparison import Comparison
from agl_grpc.evaluation.pictures import PicturesMissing, draw
from agl_grpc.evaluation.result import ALL, Evaluation, Figures
from agl_grpc.evaluation.statistics import PairedTest

_CAPTIONS = {
    "reward": "Mean reward, with 95 % intervals over tasks",
    "pass_at_k": "pass@k",
    "tasks": "Tasks by their mean reward",
    "difference": "Difference, with 95 % intervals over tasks",
}
_ABOUT_FAILURES = (
    "Failures of the agent count as wrong answers; those of infrastructure, environment and graders say "
    "nothing of the model and are in no mean."
)
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}"
    "td,th{border-bottom:1px solid #ddd;padding:.25rem .8rem;text-align:left;vertical-align:top}"
    "th{position:sticky;top:0;background:#fff}.n{text-align:right}td{overflow-wrap:anywhere}"
    ".pictures{display:flex;flex-wrap:wrap;gap:1rem}figure{flex:1 1 24rem;max-width:33rem;margin:0}"
    "svg{width:100%;height:auto}"
)
# What is set as a number: a column of these stands flush right.
_NUMBER = re.compile(r"[-+]?[\d.]*(/\d+)?")
Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Heads and rows."""
Part = str | Table
"""A paragraph or a table."""


def write_report(
    folder: Path, evaluations: Sequence[Evaluation], comparison: Comparison | None = None
) -> list[str]:
    """Writes ``report.md``, its pictures and ``report.html``; answers what is worth a line to the user.

    Args:
        folder: where; it is made.
        evaluations: one, or the two that are compared.
        comparison: of the two.
    """
    folder.mkdir(parents=True, exist_ok=True)
    said: list[str] = []
    try:
        pictures = draw(evaluations, comparison)
    except PicturesMissing as missing:
        said.append(str(missing))
        pictures = {}
    for name, text in pictures.items():
        (folder / f"{name}.svg").write_text(text)
    sections = _sections(evaluations, comparison)
    title = " and ".join(each.name for each in evaluations)
    (folder / "report.md").write_text(_markdown(title, sections, pictures))
    (folder / "report.html").write_text(_html(title, sections, pictures))
    return said


def _sections(evaluations: Sequence[Evaluation], comparison: Comparison | None) -> dict[str, list[Part]]:
    sections: dict[str, list[Part]] = {}
    if comparison is not None:
        sections["Comparison"] = [comparison.sentence, _comparison_table(comparison)]
    sections["Results"] = [figures_table(evaluations), *_how(evaluations)]
    sections["Failures"] = [*_failures(evaluations)]
    sections["Tasks"] = [_tasks_table(evaluations)]
    return sections


def _comparison_table(comparison: Comparison) -> Table:
    def row(name: str, test: PairedTest) -> list[str]:
        return [
            *(name, str(test.tasks), f"{test.difference:+.3f}", str(test.interval or "")),
            *(f"{test.p_value:.4f}", str(test.better), str(test.worse)),
        ]

    heads = ("source", "tasks", "difference", "95 % interval", "p", "better", "worse")
    return heads, [row(name, test) for name, test in {ALL: comparison.total, **comparison.sources}.items()]


def figures_table(evaluations: Sequence[Evaluation]) -> Table:
    """One row for each model and data source: the figures as text."""
    ks = sorted({k for each in evaluations for k in each.ks})
    heads = ["model", "source", "tasks", "n", "mean@n", "95 % interval"]
    heads += [*(f"pass@{k}" for k in ks), "maj@n", "failed"]
    rows = []
    for each in evaluations:
        several = each.sources if len(each.sources) > 1 else {}
        for source, found in {ALL: each.figures, **several}.items():
            row = [each.name, source, str(found.tasks), str(each.samples), _number(found.mean)]
            row += [str(found.interval or ""), *(_number(found.pass_at.get(k)) for k in ks)]
            rows.append([*row, _number(found.majority), _kinds(found)])
    return heads, rows


def _how(evaluations: Sequence[Evaluation]) -> list[str]:
    """What somebody has to know who reads the figures."""
    lines = []
    for each in evaluations:
        sampling = each.sampling
        # Without our capture before it nobody puts the seed into a request.
        seed = f"seed {sampling.seed}" if each.about.get("seeded", True) else "without request seeds"
        said = [f"temperature {sampling.temperature:g}", seed]
        said += [f"top_p {sampling.top_p:g}"] if sampling.top_p is not None else []
        said += [f"max_tokens {sampling.max_tokens}"] if sampling.max_tokens is not None else []
        lines.append(
            f"{each.name}: {each.samples} answers to each of {each.figures.tasks} tasks, {', '.join(said)}; "
            f"an answer with a reward of {each.success:g} or more is right; {each.seconds:.1f} s."
        )
        found = each.figures
        if found.majority is None:
            lines.append(f"{each.name}: maj@n is not given, because no final answers were found.")
        elif found.voted < found.tasks:
            lines.append(f"{each.name}: maj@n is over the {found.voted} tasks with a final answer.")
        lines += [
            f"{each.name}: pass@{k} leaves out {count} tasks with fewer than {k} known rewards."
            for k, count in found.left_out.items()
            if count
        ]
    return lines


def _failures(evaluations: Sequence[Evaluation]) -> list[Part]:
    rows = []
    for each in evaluations:
        counted: Counter[tuple[str, str]] = Counter()
        worth: dict[tuple[str, str], float | None] = {}
        for task in each.tasks:
            for one in task.rollouts:
                if one.failure:
                    counted[one.failure, one.message] += 1
                    worth[one.failure, one.message] = one.reward
        for (kind, message), count in counted.most_common(20):
            counts_as = "left out" if worth[kind, message] is None else "wrong"
            rows.append([each.name, kind, str(count), counts_as, message])
    if not rows:
        return ["Every rollout has a reward."]
    return [
        _ABOUT_FAILURES,
        (("model", "who is to blame", "rollouts", "counted as", "what it said"), rows),
    ]


def _tasks_table(evaluations: Sequence[Evaluation]) -> Table:
    heads = ["model", "task", "source", "mean", "right", "answers", "maj@n", "failed"]
    rows = []
    for each in evaluations:
        for task in each.tasks:
            votes = Counter(one.answer for one in task.rollouts if one.answer is not None)
            said = ", ".join(f"{answer} ({count})" for answer, count in votes.most_common(3))
            failed = Counter(one.failure for one in task.rollouts if one.failure)
            right = f"{task.right(each.success)}/{len(task.rewards)}"
            row = [each.name, str(task.index), task.source, _number(task.mean), right, said]
            kinds = ", ".join(f"{kind} {count}" for kind, count in failed.items())
            rows.append([*row, _number(task.majority), kinds])
    return heads, rows


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _kinds(found: Figures) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in found.failures.items()) or "0"


def _markdown(title: str, sections: Mapping[str, Sequence[Part]], pictures: Mapping[str, str]) -> str:
    def cell(text: str) -> str:
        return " ".join(html.escape(text, quote=False).replace("|", "\\|").split())

    lines = [f"# Evaluation: {cell(title)}", ""]
    for name, parts in sections.items():
        lines += [f"## {name}", ""]
        for part in parts:
            if isinstance(part, str):
                lines += [cell(part), ""]
                continue
            heads, rows = part
            lines += [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
            lines += [f"| {' | '.join(map(cell, row))} |" for row in rows]
            lines.append("")
        if name == "Results":
            lines += [text for at in pictures for text in (f"![{_CAPTIONS[at]}]({at}.svg)", "")]
    return "\n".join(lines)


def _html(title: str, sections: Mapping[str, Sequence[Part]], pictures: Mapping[str, str]) -> str:
    body = [f"<h1>Evaluation: {html.escape(title)}</h1>"]
    for name, parts in sections.items():
        body.append(f"<h2>{name}</h2>")
        body += [
            f"<p>{html.escape(part)}</p>" if isinstance(part, str) else _html_table(part) for part in parts
        ]
        if name == "Results" and pictures:
            figures = "".join(f"<figure>{text}</figure>" for text in pictures.values())
            body.append(f'<div class="pictures">{figures}</div>')
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><body>{''.join(body)}</body></html>\n"
    )


def _html_table(table: Table) -> str:
    heads, rows = table
    numbers = [all(_NUMBER.fullmatch(row[at]) for row in rows) for at in range(len(heads))]

    def line(cells: Sequence[str], tag: str) -> str:
        made = (
            f"<{tag}{' class=n' if number else ''}>{html.escape(text)}</{tag}>"
            for text, number in zip(cells, numbers, strict=True)
        )
        return f"<tr>{''.join(made)}</tr>"

    return f"<table>{line(heads, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
