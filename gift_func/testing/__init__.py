"""The laws, tests that every method must pass, also one of your own:

    from gift_func import testing

    def test_my_method():
        testing.check(MyMethod(rank=2))

A law is tested on *hosts*, small modules of one kind of parameter each. A method may raise `AdaptError` for a host if the
message names the parameter. The laws do not depend on a method's formula, which needs a test of its own.
"""

from .hosts import HOSTS as HOSTS
from .hosts import Host as Host
from .laws import LAWS as LAWS
from .laws import Case as Case
from .laws import check as check
from .laws import element_type_is_kept as element_type_is_kept
from .laws import refuses as refuses
