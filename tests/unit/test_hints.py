"""Suggestions in error messages."""

import pytest

from lightning_adam_mini.hints import did_you_mean, require_package

KNOWN = ["alpha", "alphas", "alphabet", "beta"]


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("betta", {}, "; did you mean beta?"),
        ("alphaa", {"count": 1}, "; did you mean alpha?"),
        ("alphaa", {"count": 2}, "; did you mean alpha or alphas?"),
        ("alphaa", {}, "; did you mean alpha, alphas or alphabet?"),
        ("betta", {"template": "of/{}"}, "; did you mean of/beta?"),
        ("betta", {"cutoff": 0.99, "otherwise": "; choose one"}, "; choose one"),
        ("zzz", {}, ""),
    ],
)
def test_names_that_come_near(name, options, expected):
    assert did_you_mean(name, iter(KNOWN), **options) == expected


def test_a_missing_package_is_named_with_its_extra():
    require_package("torch", "this")
    message = r"a page needs the package nowhere-at-all; install it with pip install 'lightning-adam-mini\[vision\]'"
    with pytest.raises(ValueError, match=message):
        require_package("nowhere", "a page", extra="vision", package="nowhere-at-all")
