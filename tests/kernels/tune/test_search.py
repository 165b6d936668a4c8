"""The search with a fake clock instead of a GPU: a landscape whose best configuration is known."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from alignedkv.errors import TuningError
from alignedkv.kernels.config import CHOICES, configurations
from alignedkv.kernels.spec import DecodeSpec
from alignedkv.kernels.target import SM90
from alignedkv.kernels.tune.search import STRATEGIES, search
from alignedkv.kernels.tune.trials import Status, Trial, fastest

pytest.importorskip("optuna")

SPEC = DecodeSpec(head_dim=128, group=4)
LEGAL = list(configurations(SPEC, SM90))


def landscape(config):
    """A separable landscape: every tunable adds the index of its choice."""
    cost = sum(
        (i + 1) * choices.index(getattr(config, name))
        for i, (name, choices) in enumerate(CHOICES.items())
    )
    return 20.0 + cost


def evaluate(config):
    return Trial(config=config, status=Status.OK, times_us=(landscape(config),))


BEST = min(map(landscape, LEGAL))


def test_grid_tries_all_and_finds_the_best():
    tried = search(LEGAL[:40], evaluate, strategy="grid")
    assert [t.config for t in tried] == LEGAL[:40]
    assert fastest(tried).median_us == min(map(landscape, LEGAL[:40]))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_is_tried_twice(strategy):
    tried = search(LEGAL, evaluate, strategy=strategy, trials=30, seed=3)
    assert len(tried) == 30
    assert len({t.config for t in tried}) == 30


def test_a_seed_repeats_a_search():
    one, two = (
        [t.config for t in search(LEGAL, evaluate, strategy="tpe", trials=15, seed=5)]
        for _ in range(2)
    )
    assert one == two


def test_tpe_gets_close_with_a_tenth_of_the_evaluations():
    trials = max(20, len(LEGAL) // 10)
    best = fastest(search(LEGAL, evaluate, strategy="tpe", trials=trials, seed=0)).median_us
    assert best <= BEST * 1.15


def test_a_wrong_answer_never_wins():
    def mostly_wrong(config):
        if landscape(config) < BEST + 5:
            return Trial(config=config, status=Status.WRONG_ANSWER, reason="bound")
        return evaluate(config)

    tried = search(LEGAL[:60], mostly_wrong, strategy="grid")
    assert any(t.status is Status.WRONG_ANSWER for t in tried) or BEST + 5 < 20
    assert fastest(tried).status is Status.OK


def test_a_trial_with_nan_is_refused():
    with pytest.raises(TuningError, match="finite"):
        Trial(config=LEGAL[0], status=Status.OK, times_us=(1.0, float("nan")))


def test_a_killed_search_resumes(tmp_path):
    journal = tmp_path / "study.log"
    tried = []

    def dies_at_five(config):
        if len(tried) == 5:
            raise KeyboardInterrupt
        tried.append(config)
        return evaluate(config)

    with pytest.raises(KeyboardInterrupt):
        search(LEGAL[:12], dies_at_five, strategy="grid", journal=journal)
    again = []

    def counted(config):
        again.append(config)
        return evaluate(config)

    done = search(LEGAL[:12], counted, strategy="grid", journal=journal)
    assert not set(tried) & set(again)
    assert {t.config for t in done} >= set(tried) | set(again)
    assert len(done) >= 11


def test_what_a_dead_worker_was_trying_is_tried_again(tmp_path):
    journal = tmp_path / "study.log"
    script = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_search import LEGAL, evaluate
from alignedkv.kernels.tune.search import search
def dies(config):
    os._exit(9)
search(LEGAL[:3], dies, strategy="grid", journal=Path({str(journal)!r}))
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    done = search(LEGAL[:3], evaluate, strategy="grid", journal=journal)
    assert {t.config for t in done} == set(LEGAL[:3])


def test_two_workers_share_a_study_without_double_work(tmp_path):
    journal = tmp_path / "study.log"
    counts: dict[object, int] = {}
    lock = threading.Lock()

    def counted(config):
        with lock:
            counts[config] = counts.get(config, 0) + 1
        return evaluate(config)

    workers = [
        threading.Thread(
            target=search,
            args=(LEGAL[:16], counted),
            kwargs={"strategy": "grid", "journal": journal, "seed": seed},
        )
        for seed in (0, 1)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert counts == dict.fromkeys(LEGAL[:16], 1)


def test_a_damaged_journal_gives_a_clear_message(tmp_path):
    journal = tmp_path / "study.log"
    journal.write_text("not a journal\n{]\n")
    with pytest.raises(TuningError, match="move it away"):
        search(LEGAL[:2], evaluate, journal=journal)
    assert journal.read_text() == "not a journal\n{]\n"


def test_time_limit_and_bad_arguments():
    assert search(LEGAL, evaluate, time_limit_s=0.0) == []
    with pytest.raises(TuningError, match="strategy"):
        search(LEGAL, evaluate, strategy="guess")
    with pytest.raises(TuningError, match="no legal"):
        search([], evaluate)


def test_progress_reports_the_best_so_far():
    seen = []
    search(
        LEGAL[:10],
        evaluate,
        strategy="grid",
        report=lambda trial, best, done: seen.append((trial.median_us, best.median_us, done)),
    )
    assert [done for *_, done in seen] == list(range(1, 11))
    assert all(best <= time for time, best, _ in seen)


def test_the_process_id_of_a_worker_is_recorded(tmp_path):
    import optuna

    journal = tmp_path / "study.log"
    search(LEGAL[:1], evaluate, strategy="grid", journal=journal)
    backend = optuna.storages.journal.JournalFileBackend(str(journal))
    study = optuna.load_study(study_name="decode", storage=optuna.storages.JournalStorage(backend))
    assert study.trials[0].user_attrs["worker"].endswith(f":{os.getpid()}")
