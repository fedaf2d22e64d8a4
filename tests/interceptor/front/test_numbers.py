"""Long lists of token ids are read as a JSON parser reads them, or refused as there."""

from __future__ import annotations

import json
import random
from array import array

import orjson
import pytest

from agl_grpc.interceptor.front.numbers import read_ids

MANY = 30_000


@pytest.mark.parametrize("seed", range(5))
def test_ids_of_any_length_are_read_as_a_parser_reads_them(seed: int) -> None:
    print(f"seed {seed}")
    generator = random.Random(seed)
    most = 10 ** generator.randrange(6, 9)
    ids = [generator.randrange(10 ** generator.randrange(1, 9)) % most for _ in range(MANY)]
    ids[:4] = [0, 9, most - 1, 10]
    ids[-2:] = [99_999_999, 0]
    for content in (ids, ids[::-1], [*ids, 2**32 - 1]):
        for text in (orjson.dumps(content), json.dumps(content).encode()):
            assert read_ids(text) == array("I", content)


@pytest.mark.parametrize(
    "wrong",
    [b"-1", b"1.5", b"4294967296", b"", b"1 2", b"null", b'"7"', b"[1]", b"1]", b"1e3", b"\xb2", b"12/3"],
)
@pytest.mark.parametrize("place", [0, MANY // 2, MANY - 1])
def test_what_is_no_id_is_refused(wrong: bytes, place: int) -> None:
    ids = [b"%d" % number for number in range(MANY)]
    ids[place] = wrong
    with pytest.raises((ValueError, TypeError, OverflowError)):
        read_ids(b"[%b]" % b",".join(ids))
