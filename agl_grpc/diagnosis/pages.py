"""A page for each step: rollouts as text, with what is trained, how likely it was, and how it was judged.

Whatever a model, a tool or a grader has written is text here: everything is escaped, and the page allows
itself no script and nothing from elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

import orjson

from agl_grpc.diagnosis.trajectories import Decode, ShownRollout, ShownRow, pieces
from agl_grpc.sample import DropReason

_LONGEST = 20_000
_HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title><style>
body{{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;
color-scheme:light dark}}
section{{border:1px solid #8886;border-radius:6px;padding:0 1rem 1rem;margin:1.5rem 0}}
pre{{white-space:pre-wrap;overflow-wrap:anywhere;background:#8881;padding:.6rem;border-radius:4px}}
table{{border-collapse:collapse}}td,th{{text-align:left;padding:.1rem .8rem .1rem 0;vertical-align:top}}
.t{{background:#2a96}}.u{{background:#e803}}.o{{opacity:.6}}.p{{opacity:.8}}small{{opacity:.7}}
</style></head><body><h1>{title}</h1>
<p><span class="t">trained</span> · <span class="u">trained, and less than one in ten likely</span> ·
<span class="o">masked: observed or left out</span> · prompt without colour. The pointer on a trained token
shows its logprob.</p>
"""


def step_page(step: int, chosen: Sequence[tuple[str, ShownRollout]], decode: Decode | None) -> str:
    """The page of a step."""
    head = _HEAD.format(title=f"Trajectories of step {step}")
    return head + "".join(_section(why, rollout, decode) for why, rollout in chosen) + "</body></html>\n"


def _section(why: str, rollout: ShownRollout, decode: Decode | None) -> str:
    reward = "none" if rollout.reward is None else f"{rollout.reward:g}"
    trained = sum(int(row.response_mask.sum()) for row in rollout.rows)
    parts = [
        f"<section><h2>{escape(why)}: reward {reward}</h2>",
        f"<p>{escape(rollout.rollout_id)} <small>attempt {escape(rollout.attempt_id)}</small></p>",
        _verdicts(rollout),
        f"<p>{rollout.captured} tokens captured, {trained} trained, {rollout.observed} observed</p>",
        _dropped(rollout),
    ]
    for number, row in enumerate(rollout.rows):
        parts.append(f"<h3>row {number}</h3><pre>{_row(row, decode)}</pre>")
    return "".join([*parts, "</section>"])


def _verdicts(rollout: ShownRollout) -> str:
    rows = [
        (each.grader, each.name, f"{each.value:g}", _short(each.notes)) for each in rollout.facts.verdicts
    ]
    return _table(("grader", "reward", "value", "notes"), rows)


def _dropped(rollout: ShownRollout) -> str:
    rows = [(str(count), reason, _sentence(reason)) for reason, count in rollout.dropped.items() if count]
    return _table(("tokens dropped", "reason", ""), rows)


def _sentence(reason: str) -> str:
    return DropReason(reason).sentence if reason in set(DropReason) else ""


def _short(notes: Any) -> str:
    return orjson.dumps(dict(notes), default=str).decode()[:2000] if notes else ""


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [("th", headings), *(("td", row) for row in rows)]
    cells = ("".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in row) for kind, row in lines)
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in cells) + "</table>"


def _row(row: ShownRow, decode: Decode | None) -> str:
    prompt, response = row.prompt_ids[-_LONGEST:], row.response_ids[:_LONGEST]
    ahead = "".join(text for _, _, text in pieces(prompt.tolist(), decode))
    left = len(row.response_ids) - len(response) + len(row.prompt_ids) - len(prompt)
    more = f"<small>… {left} more tokens, which the .jsonl beside this page has</small>" if left else ""
    return f'<span class="p">{escape(ahead)}</span>' + "".join(_tokens(row, response, decode)) + more


def _tokens(row: ShownRow, response: Any, decode: Decode | None) -> Iterator[str]:
    """The response, in stretches of one mask."""
    ids, mask = response.tolist(), row.response_mask.tolist()
    start = 0
    while start < len(ids):
        end = start
        while end < len(ids) and mask[end] == mask[start]:
            end += 1
        found = pieces(ids[start:end], decode)
        if mask[start]:
            for first, last, text in found:
                yield _trained(row, start + first, start + last, text)
        else:
            yield f'<span class="o">{escape("".join(text for _, _, text in found))}</span>'
        start = end


def _trained(row: ShownRow, start: int, end: int, text: str) -> str:
    logprobs = row.logprobs[start:end].tolist()
    said = ", ".join(f"{value:.3f}" for value in logprobs)
    ids = ", ".join(map(str, row.response_ids[start:end].tolist()))
    kind = "u" if min(logprobs) < -2.3 else "t"
    title = f"logprob {said}; token {ids}; weights of step {row.policy_versions[start]}"
    return f'<span class="{kind}" title="{escape(title)}">{escape(text)}</span>'
