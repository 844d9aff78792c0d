from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.prefix import BLOCK_BYTES, MAX_BLOCKS, PrefixTable, prefix_blocks

SECRET = b"k" * 32


def blocks(value: Any, **dumps: Any) -> tuple[int, ...]:
    return prefix_blocks(json.dumps(value, **dumps).encode(), SECRET)


def message(content: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": content}


def shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


LONG = "".join(f"line {number} of a document\n" for number in range(100))
"""About 2,200 bytes: 8 blocks."""


@pytest.mark.parametrize(
    ("value", "count"),
    [
        ("", 0),
        ("x" * (BLOCK_BYTES - 1), 0),
        ("x" * BLOCK_BYTES, 1),
        ("x" * (3 * BLOCK_BYTES + 7), 3),
        ("x" * (BLOCK_BYTES * (MAX_BLOCKS + 9)), MAX_BLOCKS),
        ("ü" * (BLOCK_BYTES // 2), 1),  # bytes, not characters
        ([], 0),
        ([message("x" * (BLOCK_BYTES - 6))], 1),  # user, NUL, ..., NUL
        ([message("x" * (BLOCK_BYTES - 7))], 0),
        ([message([{"type": "text", "text": "x" * BLOCK_BYTES}])], 1),
        ([message(None), message("x" * BLOCK_BYTES)], 1),
        ([{"role": "tool"}, message("x" * BLOCK_BYTES)], 1),
        (["x" * BLOCK_BYTES, "y" * BLOCK_BYTES], 1),  # of several prompts the first
        (list(range(1000)), (2 * 10 + 3 * 90 + 4 * 900) // BLOCK_BYTES),  # token ids, each with a comma
        ([list(range(1000))], (2 * 10 + 3 * 90 + 4 * 900) // BLOCK_BYTES),
        ({"role": "user"}, 0),
        (7, 0),
        (None, 0),
        ([{"role": 7, "content": "x" * 999}], 0),
    ],
)
def test_number_of_blocks(value: Any, count: int) -> None:
    found = blocks(value)
    assert len(found) == count
    assert len(set(found)) == count  # the same bytes twice are not the same block: hashes are chained
    assert all(0 <= block < 1 << 64 for block in found)


@pytest.mark.parametrize("raw", [b"", b"[", b'"', b"[{]", b'"\\ud800"', b"\xff", b"[" * 2000, b'[{"role":"\xff"}]'])
def test_what_is_no_prompt_has_no_blocks(raw: bytes) -> None:
    assert prefix_blocks(raw, SECRET) == ()


def test_clients_that_spell_json_differently_agree() -> None:
    talk = [message(f'{LONG} é "quoted" \U0001f600', "system"), message("and?")]
    assert blocks(talk) == blocks(talk, ensure_ascii=False) == blocks(talk, indent=2)
    assert blocks(talk) == blocks([{"content": each["content"], "role": each["role"]} for each in talk])
    parts = [{"type": "text", "text": talk[0]["content"][:100]}, {"type": "text", "text": talk[0]["content"][100:]}]
    assert blocks(talk) == blocks([message(parts, "system"), talk[1]])
    assert prefix_blocks(b"  " + json.dumps(LONG).encode() + b" ", SECRET) == blocks(LONG)


def test_a_conversation_goes_on_where_it_was() -> None:
    first = [message(LONG, "system"), message("question " * 100)]
    second = [*first, message("answer " * 100, "assistant"), message("again " * 50)]
    assert shared(blocks(first), blocks(second)) == len(blocks(first)) == 12
    other = [message(LONG, "system"), message("something else " * 60)]
    assert shared(blocks(first), blocks(other)) == (len(LONG) + len("system\0\0user\0")) // BLOCK_BYTES


def test_role_and_bounds_of_messages_count() -> None:
    assert blocks([message(LONG)])[0] != blocks([message(LONG, "system")])[0]
    assert blocks([message(LONG[:50]), message(LONG)])[0] != blocks([message(LONG[:50] + LONG)])[0]
    image = {"type": "image_url", "image_url": {"url": "data:1"}}
    assert blocks([message([image, {"text": LONG}])])[0] != blocks([message([{"text": LONG}])])[0]


@pytest.mark.parametrize("text", ["a \n", "\u00e9 \x01\x02", '\\" ', "\n" * 999 + " ", "x\n"])
def test_long_text_is_cut_where_it_makes_no_difference(text: str) -> None:
    value = text * (40 * BLOCK_BYTES * MAX_BLOCKS // len(text) // 10)
    assert blocks(value) == blocks(value[: BLOCK_BYTES * MAX_BLOCKS]) == blocks([value])
    assert len(blocks(value)) == MAX_BLOCKS


def test_hashes_need_the_key() -> None:
    raw = json.dumps(LONG).encode()
    assert not set(prefix_blocks(raw, SECRET)) & set(prefix_blocks(raw, b"other" * 6))


@given(st.text(max_size=3000), st.text(max_size=600), st.text(max_size=600))
def test_as_many_hashes_are_shared_as_whole_blocks(common: str, one: str, other: str) -> None:
    texts = [(common + each).encode() for each in (one, other)]
    alike = next((n for n, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(len(text) for text in texts))
    assert shared(blocks(common + one), blocks(common + other)) == alike // BLOCK_BYTES


@given(st.binary(max_size=300) | st.recursive(st.none() | st.text(max_size=5) | st.integers(), st.lists).map(
    lambda value: json.dumps(value).encode()))  # fmt: skip
def test_no_bytes_raise(raw: bytes) -> None:
    assert prefix_blocks(raw, SECRET) == prefix_blocks(raw, SECRET)


def test_holders_of_the_longest_beginning() -> None:
    table = PrefixTable(1000)
    table.saw([1, 2, 3], 0b001)
    table.saw([1, 2], 0b010)
    table.saw([1, 9], 0b100)
    every = 0b111
    assert table.holders([1, 2, 3, 4], every) == 0b001
    assert table.holders([1, 2, 8], every) == 0b011
    assert table.holders([1], every) == 0b111
    assert table.holders([1, 2, 3], 0b110) == 0b010  # the longest that an allowed one has seen
    assert table.holders([7], every) == table.holders([], every) == table.holders([1], 0) == 0


@given(st.lists(st.lists(st.integers(0, 10**6), min_size=1, max_size=MAX_BLOCKS), max_size=60))
def test_table_stays_bounded_and_knows_the_newest(prompts: list[list[int]]) -> None:
    table = PrefixTable(200)
    for prompt in prompts:
        table.saw(prompt, 1)
        assert len(table) <= 200 + 2 * MAX_BLOCKS
        assert table.holders(prompt, 1) == 1


def test_what_is_used_stays_and_what_is_not_is_forgotten() -> None:
    table = PrefixTable(100)
    table.saw([-1], 1)
    table.saw([-2], 1)
    for number in range(500):
        table.saw([number], 1)
        table.saw([-1], 2)
    assert table.holders([-1], 0b11) == 0b11
    assert table.holders([-2], 0b11) == 0
