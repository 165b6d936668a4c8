"""Who tries what: claims and results of one search.

A claim is made by one worker at a time, so nothing is tried twice.  `Memory` serves a search that
needs no model and no journal, `journal.Journal` every other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from alignedkv.kernels.config import DecodeConfig
from alignedkv.kernels.tune.trials import Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A configuration that one worker has taken.

    Attributes
    ----------
    config : DecodeConfig
    number : int
        Of the trial in the study.
    """

    config: DecodeConfig
    number: int


class Study(Protocol):
    """Claims and results of one search."""

    def claim(self) -> Claim | None:
        """Take the next configuration; None when all are taken."""

    def upcoming(self, count: int) -> list[DecodeConfig]:
        """What `claim` will give next, as far as that is known."""

    def record(self, claim: Claim, trial: Trial) -> None:
        """Keep what came out."""

    def release(self, claim: Claim) -> None:
        """Give a configuration back untried."""

    def trials(self) -> list[Trial]:
        """All results, those of earlier runs and other workers included."""


class Memory:
    """A study in memory: configurations in a given order."""

    def __init__(self, order: Sequence[DecodeConfig]) -> None:
        self._waiting = list(order)
        self._trials: list[Trial] = []

    def claim(self) -> Claim | None:
        """Take the first that waits."""
        if not self._waiting:
            return None
        return Claim(config=self._waiting.pop(0), number=len(self._trials))

    def upcoming(self, count: int) -> list[DecodeConfig]:
        """The first that wait."""
        return self._waiting[:count]

    def record(self, claim: Claim, trial: Trial) -> None:
        """Keep what came out."""
        self._trials.append(trial)

    def release(self, claim: Claim) -> None:
        """Put it back in front."""
        self._waiting.insert(0, claim.config)

    def trials(self) -> list[Trial]:
        """In the order of their end."""
        return list(self._trials)
