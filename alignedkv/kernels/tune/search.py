"""Which configuration to try next: grid, random or TPE, through Optuna's ask and tell.

The search is pure policy: it is given the legal configurations and a function that tries one.  A
journal file makes it resumable after a kill, and lets several workers on several GPUs or hosts
share one study; no configuration is tried twice.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignedkv.errors import TuningError
from alignedkv.kernels.config import CHOICES, DecodeConfig
from alignedkv.kernels.tune.locks import exclusive
from alignedkv.kernels.tune.trials import Status, Trial, trial_from

if TYPE_CHECKING:
    import optuna

STRATEGIES = ("grid", "random", "tpe")
#: Trials that TPE draws at random before its model says anything.
TPE_STARTUP = 8
#: Draws in a row that repeat what is known before the search gives up on finding something new.
MAX_REPEATS = 400


def search(
    legal: Sequence[DecodeConfig],
    evaluate: Callable[[DecodeConfig], Trial],
    *,
    strategy: str = "tpe",
    trials: int | None = None,
    time_limit_s: float | None = None,
    seed: int = 0,
    journal: Path | None = None,
    name: str = "decode",
    report: Callable[[Trial, Trial | None, int], None] | None = None,
) -> list[Trial]:
    """Try configurations until trials, time or the space run out.

    Parameters
    ----------
    legal : sequence of DecodeConfig
        The space (`config.configurations`), never empty.
    evaluate : function
        Tries one configuration; failures come back as a `Trial` with their status.
    strategy : str
        "grid" tries all in order, "random" without repeats, "tpe" by Optuna's estimator.
    trials : int, optional
        Evaluations by this call, at most; None for the whole space.
    time_limit_s : float, optional
        No evaluation begins after it.
    seed : int
    journal : Path, optional
        File of the study; what it holds already is not tried again.
    name : str
        Of the study inside the journal.
    report : function, optional
        Called with each trial, the best so far and the number of evaluations by this call.

    Returns
    -------
    list of Trial
        All of the study, also those from earlier calls and other workers.

    Raises
    ------
    TuningError
        If Optuna is missing, the strategy unknown, the space empty or the journal damaged.
    """
    if strategy not in STRATEGIES:
        raise TuningError(f"strategy {strategy!r}: give one of {', '.join(STRATEGIES)}")
    if not legal:
        raise TuningError("no legal configuration: see the restrictions with --explain")
    alone = partial(exclusive, journal) if journal is not None else nullcontext
    with alone():
        study = _study(strategy, seed, journal, name)
        if strategy == "grid":
            _enqueue(study, legal)
    space = set(legal)
    started = time.monotonic()
    done = repeats = 0
    while trials is None or done < trials:
        if time_limit_s is not None and time.monotonic() - started >= time_limit_s:
            break
        if len(_claimed(study)) >= len(space) or repeats >= MAX_REPEATS:
            break
        with alone():
            ask, config = _claim(study, space)
        if config is None:
            repeats += 1
            continue
        repeats = 0
        trial = evaluate(config)
        ask.set_user_attr("trial", json.dumps(asdict(trial)))
        _tell(study, ask, trial)
        done += 1
        if report is not None:
            known = recorded(study)
            best = min(known, key=lambda t: t.median_us)
            report(trial, best if best.status is Status.OK else None, done)
    return recorded(study)


def recorded(study: optuna.Study) -> list[Trial]:
    """Trials that the study holds, in the order of their numbers."""
    texts = (frozen.user_attrs.get("trial") for frozen in study.get_trials(deepcopy=False))
    return [trial_from(json.loads(text)) for text in texts if text is not None]


def _study(strategy: str, seed: int, journal: Path | None, name: str) -> optuna.Study:
    try:
        import optuna
        import optuna.storages.journal
    except ImportError:
        raise TuningError("the search needs Optuna: pip install 'alignedkv[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if strategy == "tpe":
        sampler: optuna.samplers.BaseSampler = optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=TPE_STARTUP, multivariate=True, constant_liar=True
        )
    else:
        sampler = optuna.samplers.RandomSampler(seed=seed)
    if journal is None:
        return optuna.create_study(sampler=sampler)
    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
        backend = optuna.storages.journal.JournalFileBackend(str(journal))
        storage = optuna.storages.JournalStorage(backend)
        study = optuna.create_study(
            storage=storage, study_name=name, sampler=sampler, load_if_exists=True
        )
        _release_dead_workers(study)
    except (OSError, ValueError, KeyError, AssertionError) as error:
        raise TuningError(
            f"the journal {journal} cannot be used ({error}): move it away to start afresh"
        ) from error
    return study


def _enqueue(study: optuna.Study, legal: Sequence[DecodeConfig]) -> None:
    """Queue what is neither queued nor tried; a second worker adds nothing."""
    from optuna.trial import TrialState

    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    queued = [frozen.system_attrs["fixed_params"] for frozen in waiting]
    known = _claimed(study) | {_key(params) for params in queued}
    for config in legal:
        if _key(asdict(config)) not in known:
            study.enqueue_trial(asdict(config))


def _key(params: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(params[name] for name in CHOICES)


def _suggested(ask: optuna.trial.Trial) -> DecodeConfig:
    return DecodeConfig(
        **{name: ask.suggest_categorical(name, choices) for name, choices in CHOICES.items()}
    )


def _claimed(study: optuna.Study) -> set[tuple[Any, ...]]:
    """Configurations that were tried or are being tried."""
    from optuna.trial import TrialState

    states = (TrialState.RUNNING, TrialState.COMPLETE)
    trials = study.get_trials(deepcopy=False, states=states)
    return {_key(frozen.params) for frozen in trials if set(frozen.params) == set(CHOICES)}


def _claim(
    study: optuna.Study, space: set[DecodeConfig]
) -> tuple[optuna.trial.Trial, DecodeConfig | None]:
    """Ask for a configuration; None if it is illegal or somebody has it.

    To be called by one worker at a time: the claim is made by the suggestion itself.
    """
    from optuna.trial import TrialState

    claimed = _claimed(study)
    ask = study.ask()
    config = _suggested(ask)
    if config in space and _key(asdict(config)) not in claimed:
        ask.set_user_attr("worker", _worker())
        return ask, config
    study.tell(ask, state=TrialState.FAIL)
    return ask, None


def _tell(study: optuna.Study, ask: optuna.trial.Trial, trial: Trial) -> None:
    """A wrong or failed configuration counts as far slower than any right one."""
    known = [t.median_us for t in recorded(study) if t.status is Status.OK]
    value = trial.median_us if trial.status is Status.OK else 10 * max(known, default=1e6)
    study.tell(ask, value)


def _worker() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def _release_dead_workers(study: optuna.Study) -> None:
    """Give up what a killed worker of this host was trying, so that it is tried again."""
    from optuna.trial import TrialState

    host = socket.gethostname()
    for frozen in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        owner, _, process = str(frozen.user_attrs.get("worker", "")).rpartition(":")
        if owner == host and not Path(f"/proc/{process}").exists():
            study.tell(frozen.number, state=TrialState.FAIL)
