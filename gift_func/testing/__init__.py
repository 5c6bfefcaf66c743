"""The laws that every method obeys: ours, and one of your own in three lines.

    from gift_func import testing

    def test_my_method():
        testing.check(MyMethod(rank=2))

A law holds on a *host*, a small module of one kind of parameter. A host that a method refuses counts as
tested by the refusal, which must name the place. A law does not know a method's formula: test that by hand.
"""

from .hosts import HOSTS as HOSTS
from .hosts import Host as Host
from .laws import LAWS as LAWS
from .laws import Case as Case
from .laws import check as check
from .laws import element_type_is_kept as element_type_is_kept
from .laws import refuses as refuses
