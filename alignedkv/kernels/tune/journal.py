"""Claims and results as an Optuna study: TPE asks it what to try, and workers share its file.

The journal file is what a killed search resumes from, and what workers on several GPUs or hosts
write to together.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from alignedkv.errors import TuningError
from alignedkv.kernels.config import CHOICES, DecodeConfig
from alignedkv.kernels.tune.locks import FileLock, exclusive
from alignedkv.kernels.tune.study import Claim
from alignedkv.kernels.tune.trials import Status, Trial, trial_facts, trial_from

if TYPE_CHECKING:
    import optuna

#: Trials that TPE draws at random before its model says anything.
TPE_STARTUP: Final = 8
#: A wrong configuration counts as so many times slower than the slowest right one.
FAILED_FACTOR: Final = 10.0
_FAILED_US: Final = 1e6


class Journal:
    """An Optuna study over legal configurations.

    Parameters
    ----------
    order : sequence of DecodeConfig
        The space, in the order in which it is tried where no model chooses.
    model : bool
        Whether TPE chooses.
    seed : int
    path : Path, optional
        Journal file; without it the study lives in memory.
    name : str
        Of the study in the file.

    Raises
    ------
    TuningError
        If Optuna is missing, or the file damaged: it is left as it is.
    """

    def __init__(
        self,
        order: Sequence[DecodeConfig],
        *,
        model: bool,
        seed: int,
        path: Path | None,
        name: str,
    ) -> None:
        self._order, self._model, self._path = tuple(order), model, path
        self._choices = {
            tunable: tuple(c for c in choices if any(getattr(o, tunable) == c for o in order))
            for tunable, choices in CHOICES.items()
        }
        self._results: dict[int, Trial] = {}
        with self._alone():
            self._study = _open(path, name, model=model, seed=seed)
            _release_dead_workers(self._study)
        self._spaces = {
            tunable: _optuna().distributions.CategoricalDistribution(choices)
            for tunable, choices in self._choices.items()
        }

    def claim(self) -> Claim | None:
        """Take what TPE suggests, or what is nearest to it and free; else the first that is free.

        A model of a small space suggests good configurations again and again, and illegal ones
        between them: their free neighbours are what it would try next.
        """
        with self._alone():
            free = self._free()
            if not free:
                return None
            pick = next(iter(free))
            if self._model:
                suggested, claim = self._ask(free)
                if claim is not None:
                    return claim
                pick = min(free, key=lambda config: self._distance(config, suggested))
            while True:
                # A trial that somebody queued before he died comes first, hence the loop.
                self._study.enqueue_trial(asdict(pick))
                _, claim = self._ask(free)
                if claim is not None:
                    return claim

    def upcoming(self, count: int) -> list[DecodeConfig]:
        """The first that are free; unknown where a model chooses."""
        return [] if self._model else list(self._free())[:count]

    def record(self, claim: Claim, trial: Trial) -> None:
        """Keep a trial; one that failed counts as far slower than any right one."""
        known = [t.median_us for t in self.trials() if t.status is Status.OK]
        self._set(claim.number, "trial", json.dumps(trial_facts(trial)))
        self._study.tell(claim.number, _value(trial, max(known, default=_FAILED_US)))

    def release(self, claim: Claim) -> None:
        """Fail the trial without a result, which frees its configuration."""
        self._study.tell(claim.number, state=_optuna().trial.TrialState.FAIL)

    def trials(self) -> list[Trial]:
        """In the order of their numbers."""
        for frozen in self._study.get_trials(deepcopy=False):
            text = frozen.user_attrs.get("trial")
            if text is not None and frozen.number not in self._results:
                self._results[frozen.number] = trial_from(json.loads(text))
        return [self._results[number] for number in sorted(self._results)]

    def _alone(self) -> AbstractContextManager[None]:
        return nullcontext() if self._path is None else exclusive(self._path, "claims")

    def _free(self) -> dict[DecodeConfig, None]:
        """Configurations that nobody has tried or is trying, in order."""
        state = _optuna().trial.TrialState
        states = (state.RUNNING, state.COMPLETE)
        # A claim has its worker's name before the next one begins: one without is a dead one's.
        taken = {
            _config(frozen.params)
            for frozen in self._study.get_trials(deepcopy=False, states=states)
            if "worker" in frozen.user_attrs
        }
        return dict.fromkeys(config for config in self._order if config not in taken)

    def _ask(self, free: Mapping[DecodeConfig, None]) -> tuple[DecodeConfig, Claim | None]:
        """One suggestion, claimed unless it is illegal or taken."""
        ask = self._study.ask(self._spaces)
        config = _config(ask.params)
        if config not in free:
            self._study.tell(ask, state=_optuna().trial.TrialState.FAIL)
            return config, None
        ask.set_user_attr("worker", _worker(os.getpid()))
        return config, Claim(config=config, number=ask.number)

    def _distance(self, one: DecodeConfig, other: DecodeConfig) -> float:
        """Sum over the tunables of the distance of their choices, 1 from the first to the last."""
        total = 0.0
        for tunable, choices in self._choices.items():
            apart = choices.index(getattr(one, tunable)) - choices.index(getattr(other, tunable))
            total += abs(apart) / max(len(choices) - 1, 1)
        return total

    def _set(self, number: int, key: str, value: str) -> None:
        storage = self._study._storage
        trial_id = storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)
        storage.set_trial_user_attr(trial_id, key, value)


def _optuna() -> Any:
    try:
        import optuna
        import optuna.storages.journal
    except ImportError:
        raise TuningError(
            "TPE and journals need Optuna: pip install 'alignedkv[tune]', or take grid or random "
            "without a journal"
        ) from None
    return optuna


def _open(path: Path | None, name: str, *, model: bool, seed: int) -> optuna.Study:
    library = _optuna()
    library.logging.set_verbosity(library.logging.ERROR)
    sampler = (
        library.samplers.TPESampler(
            seed=seed, n_startup_trials=TPE_STARTUP, multivariate=True, constant_liar=True
        )
        if model
        else library.samplers.RandomSampler(seed=seed)
    )
    try:
        study: optuna.Study = library.create_study(
            storage=None if path is None else _storage(path),
            study_name=name,
            sampler=sampler,
            load_if_exists=True,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise TuningError(
            f"the journal {path} cannot be used ({error}): move it away to start afresh"
        ) from error
    return study


def _storage(path: Path) -> Any:
    _cut_broken_tail(path)
    storages = _optuna().storages
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    return storages.JournalStorage(storages.journal.JournalFileBackend(str(path), lock_obj=lock))


def _cut_broken_tail(path: Path) -> None:
    """Drop the line that a killed worker left unfinished; the next one would be glued to it."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    # A file without a whole line is no journal that was cut short: leave it to be refused.
    if whole and len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))


def _config(params: Mapping[str, Any]) -> DecodeConfig:
    return DecodeConfig(**params)


def _worker(process: int) -> str:
    """Host, process and the process's start: numbers of processes come again."""
    return f"{socket.gethostname()}:{process}:{_started(process)}"


def _started(process: int) -> str:
    """Start time of a process in clock ticks since boot, empty if there is none (proc(5))."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]


def _dead(worker: str) -> bool:
    """Whether a worker of this host has ended; of other hosts nothing is known."""
    host, _, rest = worker.partition(":")
    process, _, started = rest.partition(":")
    return host == socket.gethostname() and _started(int(process)) != started


def _release_dead_workers(study: optuna.Study) -> None:
    """Give up what a killed worker was trying, so that it is tried again, but for known results."""
    state = _optuna().trial.TrialState
    for frozen in _running(study):
        worker, text = (frozen.user_attrs.get(name) for name in ("worker", "trial"))
        if worker is None or not _dead(worker):
            continue
        if text is None:
            study.tell(frozen.number, state=state.FAIL)
        else:
            study.tell(frozen.number, _value(trial_from(json.loads(text)), _FAILED_US))


def _value(trial: Trial, slowest_us: float) -> float:
    """What TPE is told: the time, or one far beyond the slowest right one."""
    return trial.median_us if trial.status is Status.OK else FAILED_FACTOR * slowest_us


def _running(study: optuna.Study) -> Iterator[optuna.trial.FrozenTrial]:
    yield from study.get_trials(deepcopy=False, states=(_optuna().trial.TrialState.RUNNING,))
