"""A function in a process of its own, which is replaced when it dies, hangs or fails.

A wrong kernel can take its CUDA context with it, or never return.  Here that costs one question and
a fresh process, not the search.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, cast

from alignedkv.errors import AlignedKVError, TuningError

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class LostProcessError(TuningError):
    """The process that should have answered ended, or was ended, without an answer.

    Attributes
    ----------
    timed_out : bool
        Whether it was ended because it took too long.
    """

    def __init__(self, message: str, *, timed_out: bool = False) -> None:
        super().__init__(message)
        self.timed_out = timed_out


class Isolated(Generic[Question, Answer]):
    """Asks a function that lives in another process.

    Parameters
    ----------
    make : function
        Called in the process to make the function that answers; picklable.
    start_timeout_s, timeout_s : float
        Seconds that `make` and an answer may take.

    Notes
    -----
    The process is spawned, never forked: a CUDA context does not survive a fork.  It starts with
    the first question and again after every failure.
    """

    def __init__(
        self,
        make: Callable[[], Callable[[Question], Answer]],
        *,
        start_timeout_s: float,
        timeout_s: float,
    ) -> None:
        self._make = make
        self._start_timeout_s, self._timeout_s = start_timeout_s, timeout_s
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None

    def ask(self, question: Question) -> Answer:
        """Answer of the function.

        Raises
        ------
        LostProcessError
            If the function raised, died or took too long; the next question gets a new process.
        TuningError
            If the function cannot be made, with the reason: asking again would not help.
        """
        pipe = self.start()
        pipe.send(question)
        kind, content = self._receive(pipe, self._timeout_s)
        if kind == "failed":
            self.close()
            raise LostProcessError(content)
        return cast(Answer, content)

    def start(self) -> Connection:
        """Start the process if there is none, and wait until it can answer."""
        if self._pipe is not None:
            return self._pipe
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._make, theirs), daemon=True)
        self._process.start()
        theirs.close()
        kind, content = self._receive(self._pipe, self._start_timeout_s)
        if kind == "failed":
            self.close()
            raise TuningError(content)
        return self._pipe

    def close(self) -> None:
        """End the process, by force if it does not listen."""
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if self._process is not None:
            self._process.join(timeout=1.0)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _receive(self, pipe: Connection, timeout_s: float) -> tuple[str, Any]:
        begun = time.monotonic()
        try:
            if pipe.poll(timeout_s):
                return cast(tuple[str, Any], pipe.recv())
        except (EOFError, ConnectionError):
            process = self._process
            if process is not None:
                process.join(timeout=1.0)
            code = None if process is None else process.exitcode
            self.close()
            raise LostProcessError(f"the measuring process ended with code {code}") from None
        self.close()
        raise LostProcessError(f"no answer within {time.monotonic() - begun:.0f} s", timed_out=True)


def _serve(make: Callable[[], Callable[[Any], Any]], pipe: Connection) -> None:
    """Answer until the other end closes; after an exception nothing here can be trusted."""
    try:
        answer = make()
        pipe.send(("ready", None))
    except Exception as error:  # noqa: BLE001 - whatever it is, the other side has to know
        pipe.send(("failed", _words(error)))
        return
    while True:
        try:
            question = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("answer", answer(question)))
        except Exception as error:  # noqa: BLE001
            pipe.send(("failed", _words(error)))
            return


def _words(error: Exception) -> str:
    """The message of one of our errors, which says what to do; the type too of any other."""
    return str(error) if isinstance(error, AlignedKVError) else f"{type(error).__name__}: {error}"
