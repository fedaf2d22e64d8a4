"""Which rollouts are shown, and pages that show what anybody wrote as text and never as markup."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import orjson

from agl_grpc.diagnosis.trajectories import choose, pieces, write_step
from agl_grpc.learner.rollouts.groups import FinishedRollout, Row
from agl_grpc.sample import AttemptFacts, Verdict

EVIL = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


def _decode(ids: list[int]) -> str:
    return "".join(EVIL if each == 66 else chr(each) for each in ids)


def _rollout(number: int, reward: float | None) -> FinishedRollout:
    row = Row(
        np.array([104, 105]),
        np.array([66, 97, 98, 99]),
        np.array([1, 0, 0, 1]),
        np.array([-0.5, 0, 0, -4.0], np.float32),
        np.array([3, -1, -1, 3]),
    )
    verdict = Verdict("judge" + EVIL, "form", 0.25, {"why": EVIL})
    return FinishedRollout(
        f"r{number}" + EVIL,
        "g",
        reward,
        (row,),
        attempt_id="at_1",
        captured=8,
        observed=4,
        dropped={"late": 2},
        facts=AttemptFacts(verdicts=(verdict,)),
    )


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_best_worst_and_random_are_different_rollouts() -> None:
    rollouts = [_rollout(number, float(number % 7)) for number in range(20)] + [_rollout(99, None)]
    chosen = choose(rollouts, 2, seed=5)
    assert [why for why, _ in chosen] == ["best", "best", "worst", "worst", "random", "random"]
    assert len({each.rollout_id for _, each in chosen}) == 6
    assert [each.reward for _, each in chosen[:4]] == [6.0, 6.0, 0.0, 0.0]
    assert choose(rollouts, 2, seed=5) == chosen
    assert choose(rollouts, 0, seed=5) == []
    assert len(choose(rollouts[:3], 2, seed=5)) == 3


def test_half_characters_are_put_together() -> None:
    ids = list("ä€x".encode())
    found = list(pieces(ids, lambda part: bytes(part).decode(errors="replace")))
    assert found == [(0, 2, "ä"), (2, 5, "€"), (5, 6, "x")]
    assert list(pieces([7], None)) == [(0, 1, "⟨7⟩")]


def test_a_page_shows_masks_logprobs_verdicts_and_no_foreign_markup(tmp_path: Path) -> None:
    page = write_step(tmp_path, 12, [("best", _rollout(1, 1.0))], _decode)
    assert page == tmp_path / "trajectories" / "step-000012.html"
    text = page.read_text()
    tags = Tags()
    tags.feed(text)
    assert {tag for tag, _ in tags.found}.isdisjoint({"script", "img", "a", "iframe"})
    assert not [name for _, found in tags.found for name in found if name.startswith("on")]
    assert "default-src 'none'" in text
    titles = [found["title"] for _, found in tags.found if "title" in found]
    assert titles == [
        "logprob -0.500; token 66; weights of step 3",
        "logprob -4.000; token 99; weights of step 3",
    ]
    assert '<span class="o">ab</span>' in text
    assert '<span class="u"' in text
    assert "the call began after its attempt had ended" in text
    line = orjson.loads(page.with_suffix(".jsonl").read_bytes())
    assert (line["why"], line["reward"], line["tokens"]["trained"]) == ("best", 1.0, 2)
    assert line["rows"][0]["response"] == f"{EVIL}abc"
    assert line["verdicts"] == [
        {"grader": "judge" + EVIL, "name": "form", "value": 0.25, "notes": {"why": EVIL}}
    ]


def test_without_a_tokenizer_ids_are_shown(tmp_path: Path) -> None:
    page = write_step(tmp_path, 1, [("worst", _rollout(1, 0.0))], None)
    assert "⟨66⟩" in page.read_text()
