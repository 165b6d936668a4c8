"""The exception tree: one root, and ValueError where the caller's value is at fault."""

import inspect

import pytest

from alignedkv import errors

BAD_VALUE = {"SpecError", "ActivationError"}
TREE = BAD_VALUE | {
    "BoundMissedError",
    "UnsupportedModelError",
    "CodegenError",
    "CompileError",
    "LaunchError",
    "TuningError",
}


def test_the_tree_is_what_all_offers() -> None:
    assert set(errors.__all__) == TREE | {"AlignedKVError"}


@pytest.mark.parametrize("name", sorted(TREE))
def test_root_catches_all_and_only_bad_values_are_value_errors(name: str) -> None:
    error = getattr(errors, name)
    assert issubclass(error, errors.AlignedKVError)
    assert issubclass(error, ValueError) == (name in BAD_VALUE)


@pytest.mark.parametrize("name", errors.__all__)
def test_each_says_when_it_is_raised(name: str) -> None:
    error = getattr(errors, name)
    assert error.__doc__ is not None
    assert inspect.getdoc(error) != inspect.getdoc(error.__base__)
