"""`agl-grpc rollouts show`: one rollout as a page of the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agl_grpc_cli.connect import with_store
from agl_grpc_cli.errors import CliError
from agl_grpc_cli.options import DEFAULT_STORE, StoreOption

if TYPE_CHECKING:
    from agl_grpc.client import StoreClient
    from agl_grpc.grader.conversation import Decode
    from agl_grpc.model import Reward, Rollout
    from agl_grpc.sample import AttemptSamples

_LONGEST = 4000
_NOTE = 2000
_TRAINED, _UNLIKELY, _MASKED = typer.colors.GREEN, typer.colors.YELLOW, typer.colors.BRIGHT_BLACK
# Less than one in ten.
_UNLIKELY_LOGPROB = -2.3
# Where there are no colours the masks are brackets.
_BRACKETS = {_TRAINED: ("⟦", "⟧"), _UNLIKELY: ("⟦", "⟧"), _MASKED: ("«", "»")}


@dataclass(frozen=True)
class _Found:
    rollout: Rollout
    rewards: Sequence[Reward]
    samples: AttemptSamples
    messages: Sequence[Any]
    emitted: Sequence[Any]


def add_commands(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(show)


def show(
    rollout_id: Annotated[str, typer.Argument(help="The rollout.")],
    store: StoreOption = DEFAULT_STORE,
    model: Annotated[str, typer.Option(help="Only calls of this model; default: all.")] = "",
    tokenizer: Annotated[
        str | None, typer.Option(metavar="PATH", help="Model folder: text in place of token ids.")
    ] = None,
    colour: Annotated[
        bool | None, typer.Option("--colour/--no-colour", help="Default: on a terminal.")
    ] = None,
) -> None:
    """Show one rollout as it is trained: what was said, masks, verdicts, and where its tokens went.

    Trained tokens are green or in ⟦ ⟧, yellow when less than one in ten likely; tokens that were observed and
    not sampled are grey or in « ».
    """
    from agl_grpc_cli.graders import load_decode

    decode = load_decode(tokenizer)
    found = with_store(store, "default", lambda client: _read(client, rollout_id, model, decode))
    if found is None:
        raise CliError(f"there is no rollout {rollout_id!r} in the store at {store}")
    for line in _page(found, decode, colour):
        typer.echo(line, color=colour)


async def _read(client: StoreClient, rollout_id: str, model: str, decode: Decode | None) -> _Found | None:
    from agl_grpc.grader import Submission
    from agl_grpc.learner.rollouts.attempts import read_attempts
    from agl_grpc.sample import SampleRules

    rollout = await client.get_rollout_by_id(rollout_id)
    if rollout is None:
        return None
    (samples,) = await read_attempts(client, [rollout], SampleRules(model=model))
    spans = await client.query_spans(rollout_id, "latest", omit_tokens=decode is None)
    rewards = await client.query_rewards([rollout_id])
    said = Submission(spans=list(spans), decode=decode)
    return _Found(rollout, list(rewards), samples, said.messages, said.emitted)


def _page(found: _Found, decode: Decode | None, colour: bool | None) -> Iterator[str]:
    rollout, samples = found.rollout, found.samples
    yield f"{rollout.rollout_id}  {rollout.status}  {rollout.mode or '-'}  group {rollout.group_id or '-'}"
    yield f"task  {_cut(rollout.input)}"
    if rollout.failure is not None:
        yield f"failure  {rollout.failure.kind}: {rollout.failure.message}"
    for reward in found.rewards:
        yield from _verdict(reward)
    for message in found.messages:
        yield ""
        yield typer.style(str(message.get("role", "")), bold=True)
        yield _cut(message.get("content") or message.get("tool_calls") or "")
    for emitted in found.emitted:
        yield ""
        yield typer.style("emitted", bold=True)
        yield _cut(emitted)
    yield ""
    dropped = {str(reason): count for reason, count in samples.account.dropped.items() if count}
    trained = sum(int(row.response_mask.sum()) for row in samples.rows)
    told = "".join(f", {count} dropped ({reason})" for reason, count in dropped.items())
    yield f"tokens  {trained} trained, {samples.account.observation} observed{told}"
    for number, row in enumerate(samples.rows):
        yield ""
        yield typer.style(f"row {number}", bold=True)
        yield _row(row, decode, colour)


def _verdict(reward: Reward) -> Iterator[str]:
    said = f"{reward.value:g}" if reward.value is not None else "none"
    by = f"  by {reward.grader}@{reward.grader_version or '-'}" if reward.grader else ""
    yield f"reward  {reward.name} = {said}{by}  revision {reward.revision}"
    if reward.failure is not None:
        yield f"  {reward.failure.kind}: {reward.failure.message}"
    for name, note in (reward.metadata or {}).items():
        yield f"  {name}: {_cut(note, _NOTE)}"


def _row(row: Any, decode: Decode | None, colour: bool | None) -> str:
    parts = [_text(row.prompt_ids.tolist(), decode)]
    ids, mask, logprobs = row.response_ids.tolist(), row.response_mask.tolist(), row.logprobs.tolist()
    kinds = [
        (_UNLIKELY if likely < _UNLIKELY_LOGPROB else _TRAINED) if on else _MASKED
        for on, likely in zip(mask, logprobs, strict=True)
    ]
    start = 0
    while start < len(ids):
        end = start
        while end < len(ids) and kinds[end] == kinds[start]:
            end += 1
        parts.append(_marked(_text(ids[start:end], decode), kinds[start], colour))
        start = end
    return "".join(parts)


def _marked(text: str, kind: str, colour: bool | None) -> str:
    import sys

    if colour if colour is not None else sys.stdout.isatty():
        return typer.style(text, fg=kind)
    before, after = _BRACKETS[kind]
    return f"{before}{text}{after}"


def _text(ids: list[int], decode: Decode | None) -> str:
    return "".join(f"<{each}>" for each in ids) if decode is None else decode(ids)


def _cut(value: Any, longest: int = _LONGEST) -> str:
    import orjson

    text = value if isinstance(value, str) else orjson.dumps(value, default=str).decode()
    # What a model or a tool has written may not steer the terminal.
    text = "".join(each if each.isprintable() or each in "\n\t" else "\ufffd" for each in text)
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text) - longest} more characters)"
