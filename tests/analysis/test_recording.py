import pytest

from alignedkv.analysis.case_files import find_cases, sample_path
from alignedkv.analysis.sweep import SweepSettings, position_tasks, sweep
from alignedkv.policy import BoundKind, PrecisionPolicy


@pytest.mark.parametrize("kind", BoundKind)
def test_the_plans_own_bound_is_among_the_three_at_every_tolerance(kind):
    cases = find_cases(sample_path(), layers=[25], kv_heads=[1], positions=[-1])
    settings = SweepSettings(
        policy=PrecisionPolicy(bound=kind, sample_values=False), tolerances=(2.0**-7, 2.0**-4)
    )
    (found,) = sweep(position_tasks(cases), settings)
    assert {record.tolerance for record in found.outputs} == {2.0**-7, 2.0**-4}
    for record in found.outputs:
        assert getattr(record, kind) == pytest.approx(record.bound, rel=1e-9)
