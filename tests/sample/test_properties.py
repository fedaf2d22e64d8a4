"""Random attempts against a slow oracle that follows the definition word by word."""

from __future__ import annotations

from collections import Counter

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agl_grpc.sample import (
    Sample,
    build_attempt,
    explain_attempt,
    pack,
    read_columns,
    sample_digest,
    token_digest,
    unpack,
)
from agl_grpc.v1.model_call_pb2 import ModelCall
from agl_grpc.v1.span_pb2 import StoredSpan
from tests.sample.calls import call, choice, record

Row = tuple[tuple[int, ...], tuple[tuple[int, int], ...]]
# How quick a machine is must not decide whether a property holds.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
token = st.integers(0, 2)
tokens = st.lists(token, min_size=1, max_size=3)


@st.composite
def attempts(draw: st.DrawFn) -> list[StoredSpan]:
    """Conversations that grow, branch, are rewritten, retried and sampled several times."""
    spans: list[StoredSpan] = []
    sequences: list[list[int]] = []
    for at in range(1, draw(st.integers(1, 7)) + 1):
        prompt = draw(tokens)
        grows: bool = draw(st.booleans())
        if sequences and grows:
            prompt = draw(st.sampled_from(tuple(sequences))) + draw(st.lists(token, max_size=2))
        answers = draw(st.lists(st.lists(token, max_size=3), min_size=1, max_size=3))
        mode = draw(st.sampled_from(["train", "train", "train", "val"]))
        finish = draw(st.sampled_from(["stop", "stop", "length"]))
        choices = [choice(ids, i, finish) for i, ids in enumerate(answers)]
        spans.append(call(prompt, *choices, at=at, mode=mode))
        sequences += [prompt + ids for ids in answers]
    return spans


def oracle_trained_answers(spans: list[StoredSpan]) -> Counter[tuple[int, ...]]:
    """Every answer that has to be trained, as its whole sequence, by T9 read literally (lists only)."""
    flat = [
        (list(m.prompt.token_ids), list(c.token_ids), m.mode, c.finish_reason)
        for m in (stored.span.model_call for stored in spans)
        for c in m.choices
    ]
    continued = []
    for prompt, _, _, _ in flat:
        begun = [p + i for p, i, _, _ in flat if i and prompt[: len(p + i)] == p + i]
        # A prompt goes on with the longest sequence that it begins with, not with beginnings of that one.
        continued += [sequence for sequence in begun if len(sequence) == max(map(len, begun))]
    trained: Counter[tuple[int, ...]] = Counter()
    for prompt, ids, mode, finish in flat:
        if mode == "train" and ids and finish != "length":
            siblings = [i for p, i, _, _ in flat if p == prompt and i]
            used = [i for i in siblings if prompt + i in continued]
            if not used or ids in used:
                trained[tuple(prompt + ids)] += 1
    return trained


def trained_answers(row: Sample, calls: dict[bytes, ModelCall]) -> list[tuple[int, ...]]:
    """Whole sequences of the row's trained answers, from its calls and its mask."""
    found = []
    offset = len(row.prompt_ids)
    whole = tuple(row.prompt_ids.tolist() + row.response_ids.tolist())
    own = [calls[span_id] for span_id in row.span_ids]
    starts = [len(c.prompt.token_ids) for c in own] + [len(whole)]
    for model_call, here, following in zip(own, starts, starts[1:], strict=False):
        lengths = [
            len(c.token_ids)
            for c in model_call.choices
            if whole[here : here + len(c.token_ids)] == tuple(c.token_ids)
            and here + len(c.token_ids) <= following
            and row.response_mask[here - offset : here - offset + len(c.token_ids)].all()
        ]
        if max(lengths, default=0):
            found.append(whole[: here + max(lengths)])
    return found


@patient
@given(attempts())
def test_the_account_balances_and_masks_agree(spans: list[StoredSpan]) -> None:
    out = build_attempt(record(*spans))
    out.account.check()
    captured = sum(
        len(s.span.model_call.prompt.token_ids) + len(c.token_ids)
        for s in spans
        for c in s.span.model_call.choices
    )
    assert out.account.captured == captured
    assert out.account.trained == sum(row.trained_tokens for row in out.rows)
    for row in out.rows:
        sampled = row.response_mask == 1
        assert (row.policy_versions[~sampled] == -1).all()
        assert (row.logprobs[~sampled] == 0).all()
        assert (row.policy_versions[sampled] == 3).all()
        assert abs(row.logprobs[sampled] + 0.01 * row.response_ids[sampled]).max(initial=0) < 1e-6


@patient
@given(attempts())
def test_every_selected_answer_is_trained_and_no_other(spans: list[StoredSpan]) -> None:
    """Sequences of trained answers, as sets: identical siblings may be told apart only by who is used."""
    out = build_attempt(record(*spans))
    expected = oracle_trained_answers(spans)
    calls = {s.span.span_id: s.span.model_call for s in spans}
    got: Counter[tuple[int, ...]] = Counter()
    for row in out.rows:
        got.update(trained_answers(row, calls))
    assert set(got) == set(expected)
    assert all(got[key] <= expected[key] for key in got), "an answer was trained twice"


@patient
@given(attempts(), st.data())
def test_digests_see_every_swap(spans: list[StoredSpan], data: st.DataObject) -> None:
    one = build_attempt(record(*spans, rollout="a", group="g", reward=1.0)).rows
    two = build_attempt(record(*spans, rollout="b", group="h", reward=0.0)).rows
    if not one:
        return
    rows = [*one, *two]
    i = data.draw(st.integers(0, len(one) - 1))
    swapped = list(rows)
    swapped[i], swapped[len(one) + i] = rows[len(one) + i], rows[i]
    assert sample_digest(swapped) != sample_digest(rows)
    assert token_digest(rows) == token_digest(list(rows))


def as_deltas(spans: list[StoredSpan]) -> list[StoredSpan]:
    """The same calls, each prompt a difference to the earlier sequence that it shares most tokens with."""
    result: list[StoredSpan] = []
    sequences: list[tuple[bytes, int, list[int]]] = []
    for stored in spans:
        copy = StoredSpan.FromString(stored.SerializeToString())
        prompt = list(copy.span.model_call.prompt.token_ids)
        best, shared = None, 0
        for span_id, place, tokens in sequences:
            common = next((i for i, (a, b) in enumerate(zip(tokens, prompt, strict=False)) if a != b), None)
            common = min(len(tokens), len(prompt)) if common is None else common
            if common > shared:
                best, shared = (span_id, place), common
        if best is not None:
            del copy.span.model_call.prompt.token_ids[:shared]
            copy.span.model_call.prompt.base_span_id, copy.span.model_call.prompt.base_choice = best
            copy.span.model_call.prompt.base_length = shared
        for place, answer in enumerate(copy.span.model_call.choices):
            sequences.append((copy.span.span_id, place, prompt + list(answer.token_ids)))
        result.append(copy)
    return result


@patient
@given(attempts())
def test_differences_make_the_same_samples_as_whole_prompts(spans: list[StoredSpan]) -> None:
    whole, deltas = build_attempt(record(*spans)), build_attempt(record(*as_deltas(spans)))
    assert token_digest(whole.rows) == token_digest(deltas.rows)
    assert (whole.account, whole.row_starts) == (deltas.account, deltas.row_starts)


@patient
@given(attempts())
def test_explanations_add_up_to_the_account(spans: list[StoredSpan]) -> None:
    account = build_attempt(record(*spans)).account
    found: Counter[str] = Counter()
    for answer in explain_attempt(record(*spans)):
        end = 0
        for stretch in answer.stretches:
            assert stretch.start == end < stretch.end
            end = stretch.end
            word = stretch.reason.partition(":")[0] if stretch.fate == "dropped" else stretch.fate
            found[word] += stretch.end - stretch.start
    assert found.pop("trained", 0) == account.trained
    assert found.pop("observation", 0) == account.observation
    assert found == account.dropped


@patient
@given(attempts())
def test_packed_columns_come_back(spans: list[StoredSpan]) -> None:
    rows = build_attempt(record(*spans)).rows
    again = list(unpack(read_columns(pack(rows))))
    assert token_digest(again) == token_digest(rows)
    assert [(row.turns, row.start, row.rewards) for row in again] == [
        (row.turns, row.start, row.rewards) for row in rows
    ]
