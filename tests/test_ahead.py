"""Pieces that a thread makes while those before are used: the same, in order, bounded, and nothing is left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from clipcli.images.ahead import ahead


def test_the_same_pieces_in_order() -> None:
    assert list(ahead(iter(range(1000)), 2)) == list(range(1000))
    assert list(ahead([], 2)) == []


def test_no_more_are_made_than_allowed_and_none_unasked() -> None:
    made: list[int] = []
    waiting = threading.Semaphore(0)

    def pieces() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            waiting.release()
            yield number

    found = ahead(pieces(), 2)
    assert made == []
    for number in range(20):
        assert next(found) == number
        while len(made) < number + 3:  # the one in use and two ahead
            assert waiting.acquire(timeout=60)
        assert len(made) == number + 3


def test_an_error_comes_in_its_place_and_is_the_last_thing() -> None:
    def pieces() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyError("three")

    found = ahead(pieces(), 5)
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(KeyError, match="three"):
        next(found)
    assert list(found) == []


def test_closing_ends_the_thread_and_its_pieces() -> None:
    ended = threading.Event()

    def pieces() -> Iterator[int]:
        try:
            yield from range(100)
        finally:
            ended.set()

    found = ahead(pieces(), 2)
    assert next(found) == 0
    found.close()  # type: ignore[attr-defined]
    assert ended.wait(60)
    assert not [one for one in threading.enumerate() if one.name == "clipcli-ahead" and _alive_after(one)]


def _alive_after(thread: threading.Thread) -> bool:
    thread.join(60)
    return thread.is_alive()
