"""The search with a made-up landscape instead of a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from alignedkv.errors import TuningError
from alignedkv.kernels.config import DecodeConfig
from alignedkv.kernels.tune.search import STRATEGIES, search
from alignedkv.kernels.tune.trials import Status, Trial, fastest
from landscapes import SPACE, cost_us, timed

pytest.importorskip("optuna")

BEST = min(map(cost_us, SPACE))


def test_grid_tries_all_and_finds_the_best() -> None:
    tried = search(SPACE, timed, strategy="grid")
    assert [t.config for t in tried] == SPACE
    best = fastest(tried)
    assert best is not None
    assert best.median_us == BEST


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_is_tried_twice(strategy: str) -> None:
    space = SPACE[::12]
    tried = search(space, timed, strategy=strategy, seed=3)
    assert len(tried) == len(space)
    assert {t.config for t in tried} == set(space)


@pytest.mark.parametrize("strategy", ["random", "tpe"])
def test_a_seed_repeats_a_search(strategy: str) -> None:
    def configs(seed: int) -> list[DecodeConfig]:
        return [t.config for t in search(SPACE, timed, strategy=strategy, trials=12, seed=seed)]

    assert configs(5) == configs(5) != configs(6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_wrong_answer_never_wins(strategy: str) -> None:
    space = SPACE[::16]
    limit = sorted(map(cost_us, space))[5]

    def mostly_wrong(config: DecodeConfig) -> Trial:
        if cost_us(config) < limit:
            return Trial(config=config, status=Status.WRONG_ANSWER, reason="outside its bound")
        return timed(config)

    best = fastest(search(space, mostly_wrong, strategy=strategy))
    assert best is not None
    assert best.median_us == limit


def test_a_search_in_which_nothing_is_right_ends() -> None:
    def wrong(config: DecodeConfig) -> Trial:
        return Trial(config=config, status=Status.LAUNCH_FAILED, reason="refused")

    tried = search(SPACE[:9], wrong, strategy="tpe")
    assert len(tried) == 9
    assert fastest(tried) is None


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_interrupted_search_resumes(strategy: str, tmp_path: Path) -> None:
    space, journal = SPACE[:8], tmp_path / "study.log"
    tried: list[DecodeConfig] = []

    def dies_at_five(config: DecodeConfig) -> Trial:
        if len(tried) == 5:
            raise KeyboardInterrupt
        tried.append(config)
        return timed(config)

    def counted(config: DecodeConfig) -> Trial:
        tried.append(config)
        return timed(config)

    with pytest.raises(KeyboardInterrupt):
        search(space, dies_at_five, strategy=strategy, journal=journal, ahead=1)
    done = search(space, counted, strategy=strategy, journal=journal)
    assert len(tried) == len(set(tried)) == len(done) == len(space)


KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from landscapes import SPACE, timed
from alignedkv.kernels.tune.search import search
tried = []
def evaluate(config):
    if len(tried) == 2 and {when!r} == "recording":
        import optuna
        optuna.Study.tell = lambda *facts, **more: os._exit(9)
    if len(tried) == 3:
        os._exit(9)
    tried.append(config)
    return timed(config)
search(SPACE[:6], evaluate, strategy="grid", journal=Path({journal!r}))
"""


@pytest.mark.parametrize("when", ["trying", "recording"])
def test_a_killed_search_resumes_even_where_it_was_killed_while_writing(
    when: str, tmp_path: Path
) -> None:
    journal = tmp_path / "study.log"
    tests = str(Path(__file__).parents[2])
    script = KILLED.format(tests=tests, journal=str(journal), when=when)
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    with journal.open("ab") as file:
        file.write(b'{"op_code": 6, "worker_')
    again: list[DecodeConfig] = []

    def counted(config: DecodeConfig) -> Trial:
        again.append(config)
        return timed(config)

    done = search(SPACE[:6], counted, strategy="grid", journal=journal)
    assert [t.config for t in done if t.config not in again] == SPACE[:3]
    assert again == SPACE[3:6]


def test_two_workers_share_a_study_without_double_work(tmp_path: Path) -> None:
    space, journal = SPACE[:10], tmp_path / "study.log"
    counts: dict[DecodeConfig, int] = {}
    lock = threading.Lock()

    def counted(config: DecodeConfig) -> Trial:
        with lock:
            counts[config] = counts.get(config, 0) + 1
        return timed(config)

    def work(seed: int) -> None:
        search(space, counted, strategy="random", journal=journal, seed=seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert counts == dict.fromkeys(space, 1)


def test_studies_of_other_names_do_not_meet(tmp_path: Path) -> None:
    journal = tmp_path / "study.log"
    for name in ("a", "b"):
        assert len(search(SPACE[:2], timed, strategy="grid", journal=journal, name=name)) == 2


@pytest.mark.parametrize("content", ["not a journal\n{]\n", '{"op_code": 0}\n[]\n', "[1]\n"])
def test_a_damaged_journal_gives_a_clear_message(content: str, tmp_path: Path) -> None:
    journal = tmp_path / "study.log"
    journal.write_text(content)
    with pytest.raises(TuningError, match=r"study\.log cannot be used .*move it away"):
        search(SPACE[:2], timed, journal=journal)
    assert journal.read_text() == content


def test_limits_and_bad_arguments() -> None:
    assert search(SPACE, timed, strategy="grid", time_limit_s=0.0) == []
    assert len(search(SPACE, timed, strategy="grid", trials=3)) == 3
    with pytest.raises(TuningError, match="strategy 'guess': give one of grid, random, tpe"):
        search(SPACE, timed, strategy="guess")
    with pytest.raises(TuningError, match="--explain"):
        search([], timed)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_tried_soon_is_announced(strategy: str) -> None:
    announced: set[DecodeConfig] = set()
    calls = 0

    def prepare(configs: Sequence[DecodeConfig]) -> None:
        nonlocal calls
        calls += 1
        announced.update(configs)

    def evaluate(config: DecodeConfig) -> Trial:
        assert config in announced
        return timed(config)

    tried = search(SPACE, evaluate, strategy=strategy, trials=12, ahead=3, prepare=prepare)
    assert len(tried) == 12
    assert len(announced) == (12 if strategy == "tpe" else 15)
    assert calls == (3 if strategy == "tpe" else 12)


def test_progress_reports_the_best_so_far() -> None:
    seen: list[tuple[float, float, int]] = []

    def report(trial: Trial, best: Trial | None, done: int) -> None:
        assert best is not None
        seen.append((trial.median_us, best.median_us, done))

    search(SPACE, timed, strategy="random", trials=10, report=report)
    assert [done for *_, done in seen] == list(range(1, 11))
    times = [time for time, *_ in seen]
    assert [best for _, best, _ in seen] == [min(times[: i + 1]) for i in range(10)]


def test_without_optuna_grid_and_random_still_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    for strategy in ("grid", "random"):
        assert len(search(SPACE, timed, strategy=strategy, trials=4)) == 4
    with pytest.raises(TuningError, match="need Optuna"):
        search(SPACE, timed, strategy="tpe", trials=4)


def test_a_worker_is_told_apart_from_a_later_process_of_the_same_number(tmp_path: Path) -> None:
    import optuna

    journal = tmp_path / "study.log"
    search(SPACE[:1], timed, strategy="grid", journal=journal)
    backend = optuna.storages.journal.JournalFileBackend(str(journal))
    study = optuna.load_study(study_name="decode", storage=optuna.storages.JournalStorage(backend))
    host, process, started = study.trials[0].user_attrs["worker"].split(":")
    assert host
    assert int(process) == os.getpid()
    assert int(started) > 0
