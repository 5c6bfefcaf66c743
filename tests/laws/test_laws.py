"""The table of laws: one row a method and configuration, every law on every kind of parameter."""

from __future__ import annotations

import pytest
from helpers.methods import METHODS

import gift_func as gf
from gift_func import testing


@pytest.mark.parametrize("law", testing.LAWS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_law(method: gf.Method, law: str) -> None:
    testing.check(method, laws=[law])


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_element_type_is_kept(method: gf.Method) -> None:
    for name, host in testing.HOSTS.items():
        if not testing.refuses(method, name):
            testing.element_type_is_kept(method, host)
