"""The check of feedback: bounds a little above the reference's pass it, wrong hints do not."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from alignedkv.kernels import reference
from alignedkv.kernels.arrays import DecodeResult, HeadState
from alignedkv.policy import FEEDBACK_GAIN, MARGIN_FALL, MARGIN_RISE
from numba_cuda_checks import check_step, probed
from problems import RECIPES, Problem, make

#: By which a bound exceeds the reference's: half of what `check_step` grants an estimate.
EXCESS = 2.0**-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step that is the reference's but for larger bounds, and for what follows from them."""

    problem: Problem
    told: HeadState
    wanted: DecodeResult  # of the reference

    @property
    def bound(self) -> NDArray[np.float64]:
        return (1 + EXCESS) * self.wanted.bound.astype(np.float64)

    @property
    def missed(self) -> NDArray[np.bool_]:
        return ~(self.bound <= self.problem.arguments.tolerance * (self.wanted.size - self.bound))

    @property
    def edge(self) -> NDArray[np.bool_]:
        """Heads whose bound misses, while the reference's does not."""
        return self.missed & (self.wanted.missed == 0)

    def margin(self, missed: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Where it is far from the ends of its range."""
        return self.told.margin + np.where(missed, MARGIN_RISE, -MARGIN_FALL)

    def theta(self, margin: NDArray[np.float64]) -> NDArray[np.float64]:
        """Where it is far from the ends of its range."""
        tau = self.problem.arguments.tolerance * self.wanted.size
        return self.told.theta * (tau / self.bound * 2.0**-margin) ** FEEDBACK_GAIN

    def check(
        self,
        missed: NDArray[np.bool_],
        margin: NDArray[np.float64],
        theta: NDArray[np.float64],
    ) -> None:
        state = replace(
            self.wanted.state, margin=margin.astype(np.float32), theta=theta.astype(np.float32)
        )
        found = replace(
            self.wanted,
            bound=self.bound.astype(np.float32),
            missed=missed.astype(self.wanted.missed.dtype),
            state=state,
        )
        check_step(self.problem, self.told, found)


@pytest.fixture(params=["float32", "softcap-estimate"])
def step(request: pytest.FixtureRequest) -> Step:
    p = make(RECIPES[request.param])
    p = replace(p, arguments=replace(p.arguments, repairs=0))
    told = probed(p)
    wanted = reference.decode(p.spec, p.cache, p.query, told, p.arguments)
    found = Step(problem=p, told=told, wanted=wanted)
    assert found.edge.any()
    assert not found.edge.all()
    return found


def test_a_bound_at_the_edge_may_miss_where_the_references_does_not(step: Step) -> None:
    margin = step.margin(step.missed)
    theta = step.theta(margin)
    step.check(step.missed, margin, theta)
    # More than the larger bound, which would have kept the reference's margin, takes from theta.
    fallen = step.theta(step.margin(step.wanted.missed != 0))
    assert (theta[step.edge] < 0.96 * fallen[step.edge]).all()


@pytest.mark.parametrize("at_the_edge", [True, False])
def test_theta_aims_at_the_margin_that_follows_the_miss(step: Step, at_the_edge: bool) -> None:
    margin = step.margin(step.missed)
    heads = step.edge == at_the_edge
    for theta in (step.theta(step.margin(~step.missed)), 0.95 * step.theta(margin)):
        with pytest.raises(AssertionError):
            step.check(step.missed, margin, np.where(heads, theta, step.theta(margin)))


@pytest.mark.parametrize("at_the_edge", [True, False])
def test_the_margin_follows_the_miss(step: Step, at_the_edge: bool) -> None:
    told = np.where(step.edge == at_the_edge, ~step.missed, step.missed)
    margin = step.margin(told)
    with pytest.raises(AssertionError):
        step.check(step.missed, margin, step.theta(margin))


def test_a_bound_away_from_the_edge_misses_where_the_references_does(step: Step) -> None:
    relative = step.bound / step.wanted.size
    for head in (relative.argmin(), relative.argmax()):
        missed = step.missed ^ (np.arange(relative.size) == head).reshape(relative.shape)
        margin = step.margin(missed)
        with pytest.raises(AssertionError):
            step.check(missed, margin, step.theta(margin))
