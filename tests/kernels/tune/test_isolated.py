"""A function in a process of its own: answers, deaths, hangs, failures."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial

import pytest

from alignedkv.errors import TuningError
from alignedkv.kernels.tune.isolated import Isolated, LostProcessError


def make_answers(start: int) -> Callable[[str], object]:
    """Counts its questions; "die" and "hang" are what a wrong kernel does."""
    count = start

    def answer(question: str) -> object:
        nonlocal count
        count += 1
        if question == "die":
            os._exit(5)
        if question == "hang":
            time.sleep(60)
        if question == "raise":
            raise RuntimeError("illegal memory access")
        return count if question == "count" else os.getpid()

    return answer


def make_nothing() -> Callable[[str], object]:
    raise TuningError("no memory for this problem: take fewer tokens")


def isolated(timeout_s: float = 20.0) -> Isolated[str, object]:
    return Isolated(partial(make_answers, 10), start_timeout_s=60.0, timeout_s=timeout_s)


def test_answers_come_from_one_other_process() -> None:
    with isolated() as process:
        assert [process.ask("count") for _ in range(3)] == [11, 12, 13]
        assert process.ask("pid") == process.ask("pid") != os.getpid()


def test_a_process_that_dies_or_fails_is_replaced() -> None:
    with isolated() as process:
        with pytest.raises(LostProcessError, match="ended with code 5") as lost:
            process.ask("die")
        assert not lost.value.timed_out
        assert process.ask("count") == 11
        with pytest.raises(LostProcessError, match="RuntimeError: illegal memory access"):
            process.ask("raise")
        assert process.ask("count") == 11


def test_a_process_that_hangs_is_ended_and_replaced() -> None:
    with isolated(timeout_s=0.3) as process:
        process.start()
        begun = time.monotonic()
        with pytest.raises(LostProcessError, match="no answer within") as lost:
            process.ask("hang")
        assert lost.value.timed_out
        assert time.monotonic() - begun < 10.0


def test_what_cannot_be_made_says_why() -> None:
    with (
        Isolated(make_nothing, start_timeout_s=60.0, timeout_s=1.0) as process,
        pytest.raises(TuningError, match="take fewer tokens") as failed,
    ):
        process.ask("count")
    assert not isinstance(failed.value, LostProcessError)
