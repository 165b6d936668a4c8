"""What a decode step may be specified as."""

import pytest

from alignedkv.errors import SpecError
from alignedkv.kernels.arrays import StepArguments
from alignedkv.kernels.spec import HEAD_DIMS, DecodeSpec
from alignedkv.policy import BoundKind, PrecisionPolicy


@pytest.mark.parametrize(
    ("changes", "allowed"),
    [
        ({"head_dim": 100}, "64, 80, 96, 128, 192, 256"),
        ({"group": 0}, "1 to 16"),
        ({"group": 17}, "1 to 16"),
        ({"query_dtype": "float64"}, "float16, bfloat16, float32"),
        ({"row_dtype": "int8"}, "float16, bfloat16, float32"),
        ({"stored_planes": 1}, "2 to 4"),
        ({"stored_planes": 5}, "2 to 4"),
        ({"dither_rows": 16}, "32, 64, 128 or 256"),
        ({"page_tokens": 48}, "16, 32, 64, 128, 256"),
        ({"sample_values": True, "bound": BoundKind.DETERMINISTIC}, "sample_values"),
        ({"softcap": True, "bound": BoundKind.STATISTICAL}, "softcap"),
    ],
)
def test_what_cannot_be_emitted_is_refused(changes: dict[str, object], allowed: str) -> None:
    with pytest.raises(SpecError, match=allowed):
        DecodeSpec(**{"head_dim": 128, "group": 4, **changes})


def test_layouts_of_keys_and_values_must_agree() -> None:
    policy = PrecisionPolicy(key_layout="4|4|8")
    with pytest.raises(SpecError, match="one layout for both"):
        DecodeSpec.from_policy(policy, head_dim=64, group=1)


def test_a_policy_and_a_model_make_a_spec_and_its_arguments() -> None:
    policy = PrecisionPolicy(
        tolerance=2.0**-5,
        bound="statistical",
        key_layout="4|2|2|8",
        value_layout="4|2|2|8",
        stored_planes=3,
        dither_rows=256,
        exact_last=8,
        plan_margin=1.5,
        skip_share=0.1,
    )
    spec = DecodeSpec.from_policy(policy, head_dim=80, group=3, row_dtype="float16", sinks=True)
    assert str(spec.layout) == "4|2|2|8"
    assert (spec.stored_planes, spec.dither_rows, spec.exact_rows) == (3, 256, True)
    assert (spec.bound, spec.row_dtype, spec.sinks) == (BoundKind.STATISTICAL, "float16", True)
    assert not spec.sample_values
    assert DecodeSpec.from_policy(PrecisionPolicy(), head_dim=64, group=1).sample_values
    arguments = StepArguments.from_policy(policy, scaling=0.1, head_dim=80, tokens=4096, window=512)
    assert (arguments.tolerance, arguments.skip_share) == (2.0**-5, 0.1)
    assert arguments.deviations == policy.deviations(80, 4096)
    assert (arguments.plan_margin, arguments.window) == (1.5, 512)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_channels_are_whole_products(head_dim: int) -> None:
    channels = DecodeSpec(head_dim=head_dim, group=1).channels
    assert head_dim <= channels < head_dim + 32
    assert channels % 32 == 0
