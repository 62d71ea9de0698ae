"""The one rule that chooses an implementation."""

import warnings

import pytest

from pallas_kernels.dispatch import Implementation, SlowerPathWarning, dispatch

FAST = Implementation("fast", lambda x: ("fast", x), lambda x: None if x > 0 else f"x is {x}, must be positive")
SLOW = Implementation("slow", lambda x: ("slow", x), lambda x: None if x > -10 else f"x is {x}, must be above -10")
CHECK = Implementation("check", lambda x: ("check", x), lambda x: None, for_tests=True)
ALL = (FAST, SLOW, CHECK)


def test_the_first_that_supports_the_call_runs():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch("op", ALL, None, 1) == ("fast", 1)


def test_a_passed_over_implementation_is_named_with_its_reason():
    with pytest.warns(SlowerPathWarning, match=r"op runs on 'slow': 'fast' passed over \(x is -1, must be positive\)"):
        assert dispatch("op", ALL, None, -1) == ("slow", -1)


def test_a_reference_never_runs_unnamed():
    with pytest.raises(NotImplementedError, match=r"op: no implementation .*x is -20, must be positive.*above -10"):
        dispatch("op", ALL, None, -20)
    assert dispatch("op", ALL, "check", -20) == ("check", -20)


def test_a_named_implementation_runs_or_says_why_not():
    assert dispatch("op", ALL, "slow", 1) == ("slow", 1)
    with pytest.raises(NotImplementedError, match="op: implementation 'fast' can't run this call: x is -1"):
        dispatch("op", ALL, "fast", -1)
    with pytest.raises(ValueError, match="op: implementation='cudnn' is unknown; there are fast, slow, check"):
        dispatch("op", ALL, "cudnn", 1)
