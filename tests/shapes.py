"""The run-time checker of shape annotations, for every function but constructors.

Configurations check their own fields and say what is allowed; a second check in front of that would
hide the messages that users see.
"""

from collections.abc import Callable
from typing import Any

from beartype import beartype


def check(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """Check a function's arguments and result whenever it is called."""
    if function.__qualname__.endswith("__init__"):
        return function
    return beartype(function, *args, **kwargs)
