"""Upstreams, settings, streams: the proxy's pure parts."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agl_grpc.interceptor.front.dialects import NOTHING_ASKED, Collector
from agl_grpc.interceptor.front.settings import BadUpstream, UpstreamSpec, parse_upstream, read_upstreams
from agl_grpc.interceptor.front.streams import Events
from agl_grpc.interceptor.front.upstreams import rank
from tests.interceptor.front.fake_engine import TOKENS, events_of
from tests.interceptor.front.rig import CHAT, HELLO

URLS = st.lists(
    st.integers(0, 10_000).map(lambda n: f"http://engine-{n}:8000"), min_size=1, max_size=8, unique=True
)


@given(URLS, st.lists(st.text(min_size=1, max_size=12), max_size=60), st.integers(10_001, 10_050))
def test_an_engine_that_comes_takes_only_its_own_share(
    urls: list[str], rollouts: list[str], new: int
) -> None:
    added = f"http://engine-{new}:8000"
    for rollout in rollouts:
        before, after = rank(rollout, urls), rank(rollout, [*urls, added])
        assert after[0] in (before[0], added)
        assert [url for url in after if url != added] == before
        assert rank(rollout, random.sample(urls, len(urls))) == before


def test_the_shares_are_even() -> None:
    urls = [f"http://10.0.0.{number}:8000" for number in range(4)]
    first = Counter(rank(f"ro-{number}", urls)[0] for number in range(4000))
    assert all(850 < count < 1150 for count in first.values()), first


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://h:1", UpstreamSpec("http://h:1")),
        ("http://h:1/v1/", UpstreamSpec("http://h:1")),
        ("org/model=https://h/v1", UpstreamSpec("https://h", "org/model")),
    ],
)
def test_upstreams(text: str, expected: UpstreamSpec) -> None:
    assert parse_upstream(text) == expected


@pytest.mark.parametrize("text", ["", "h:1", "m=h:1", "http://", "m=ftp://h"])
def test_what_names_no_engine(text: str) -> None:
    with pytest.raises(BadUpstream, match="write URL or MODEL=URL"):
        parse_upstream(text)


def test_a_file_of_upstreams(tmp_path: Path) -> None:
    listed = tmp_path / "engines"
    listed.write_text("# ours\nhttp://a:1\n\nm=http://b:1/v1 drain # going\n")
    assert read_upstreams(listed) == [UpstreamSpec("http://a:1"), UpstreamSpec("http://b:1", "m", True)]
    listed.write_text("http://a:1 later\n")
    with pytest.raises(BadUpstream, match=r"engines:1: after the URL only `drain` may stand"):
        read_upstreams(listed)


@given(st.lists(st.integers(1, 400), max_size=12), st.booleans())
def test_a_stream_cut_anywhere_gives_the_same_events(cuts: list[int], windows: bool) -> None:
    data = b"".join(events_of(CHAT, {**HELLO, "return_token_ids": True, "logprobs": True}))
    if windows:
        data = data.replace(b"\n", b"\r\n")
    whole = Events(Collector("chat.completions", NOTHING_ASKED))
    expected = whole.feed(data) + whole.held
    collector = Collector("chat.completions", NOTHING_ASKED)
    events = Events(collector)
    out, start = b"", 0
    for cut in cuts:
        out += events.feed(data[start : start + cut])
        start += cut
    out += events.feed(data[start:])
    events.check()
    events.end()
    assert out + events.held == expected
    assert list(collector.choices[0].token_ids) == TOKENS
