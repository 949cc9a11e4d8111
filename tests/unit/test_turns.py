from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdmaxfer.cm.turns import Request, Turns


def request(connection: str, number: int) -> Request:
    name = connection.encode()
    return Request(name + b"%d" % number, [name, b""], "192.0.2.1")


def taken(turns: Turns) -> list[bytes]:
    return [turns.take().data for _ in range(len(turns))]


def test_connections_take_turns() -> None:
    turns = Turns(100)
    for asked in (("a", 1), ("a", 2), ("a", 3), ("b", 1), ("c", 1), ("b", 2)):
        assert turns.add(request(*asked))
    assert turns.take().data == b"a1"
    assert turns.add(request("d", 1))
    assert taken(turns) == [b"b1", b"c1", b"a2", b"d1", b"b2", b"a3"]
    with pytest.raises(StopIteration):
        turns.take()


def test_a_repeat_keeps_its_place_and_is_answered_where_it_was_sent_from_last() -> None:
    turns = Turns(100)
    turns.add(request("a", 1))
    turns.add(request("b", 1))
    again = Request(b"a1", [b"later", b"7", b""], "192.0.2.2")
    assert turns.add(again)
    assert len(turns) == 2
    assert turns.take() == again


def test_who_asks_much_makes_room_for_who_asks_little() -> None:
    turns = Turns(4)
    for number in range(4):
        assert turns.add(request("flood", number))
    assert not turns.add(request("flood", 4))
    assert turns.add(request("new", 0))
    assert turns.add(request("newer", 0))
    assert not turns.add(request("new", 1)), "both have two, then"
    assert taken(turns) == [b"flood0", b"new0", b"newer0", b"flood1"]


@given(st.integers(1, 8), st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5))))
def test_the_limit_holds_and_nothing_that_was_accepted_is_answered_twice(
    limit: int, asked: list[tuple[str, int]]
) -> None:
    turns = Turns(limit)
    accepted = {each.data for each in (request(*one) for one in asked) if turns.add(each)}
    assert len(turns) <= limit
    answered = taken(turns)
    assert len(set(answered)) == len(answered)
    assert set(answered) <= accepted
    assert len(turns) == 0
