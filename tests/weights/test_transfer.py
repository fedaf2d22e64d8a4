"""Weight transfer between real process groups, in the engine environment."""

from __future__ import annotations

import json

import pytest

from tests.support.environments import run_in_engine

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

CASES = [
    "all_bytes_arrive_at_two_receivers_and_the_group_is_reused",
    "a_changed_set_of_receivers_gets_a_new_group",
    "a_flipped_byte_is_named_and_nothing_is_staged",
    "a_missing_receiver_ends_at_the_deadline_on_both_sides",
    "adapters_are_added_to_their_base_and_others_refused",
    "abort_frees_the_staging_memory_and_cancel_ends_the_sender",
    "a_sender_that_is_not_there_is_one_line",
    "kept_weights_come_back_and_damaged_ones_do_not",
    "the_digest_does_not_depend_on_the_bucket_size",
]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """Traceback of each case; empty where it passed."""
    found: dict[str, str] = json.loads(run_in_engine("tests.weights.transfer_cases").splitlines()[-1])
    assert sorted(found) == sorted(CASES)
    return found


@pytest.mark.parametrize("case", CASES)
def test_transfer(outcomes: dict[str, str], case: str) -> None:
    assert outcomes[case] == ""
