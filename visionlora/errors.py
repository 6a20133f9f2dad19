"""What can go wrong, as a user sees it.

```
VisionLoraError (ValueError)  a request that cannot be served: one line, and what can be instead
├── TargetError               a target matches nothing, or something that cannot carry an adapter
├── ConfigError               an unknown method or option, or a value out of range
├── AdapterFileError          a file that is truncated, foreign, inconsistent or for another model
├── AdapterStateError         a verb in the wrong state: merging twice, an unknown adapter name
├── NeverTrainedError         an adapter or head that receives no gradient
├── DivergedError             a training whose loss or gradients stay non-finite
├── DataError                 images or folders that cannot be read or do not suffice
└── OutputError               a folder or file that cannot be written
```

Scripts turn a `VisionLoraError` into one line on stderr and exit code 2.
"""

import difflib
from collections.abc import Iterable

__all__ = [
    "AdapterFileError",
    "AdapterStateError",
    "ConfigError",
    "DataError",
    "DivergedError",
    "NeverTrainedError",
    "OutputError",
    "TargetError",
    "VisionLoraError",
    "nearest",
]


class VisionLoraError(ValueError):
    """Base of every error that a user can cause and mend."""


class TargetError(VisionLoraError):
    """A target pattern that matches nothing usable."""


class ConfigError(VisionLoraError):
    """An unknown method, option or value."""


class AdapterFileError(VisionLoraError):
    """An adapter file that cannot be used with this model."""


class AdapterStateError(VisionLoraError):
    """A verb called in a state that does not allow it."""


class NeverTrainedError(VisionLoraError):
    """A trainable tensor that the loss does not reach."""


class DivergedError(VisionLoraError):
    """A training whose loss or gradients stay non-finite."""


class DataError(VisionLoraError):
    """Input data that is missing, unreadable or too small."""


class OutputError(VisionLoraError):
    """An output path that cannot be written."""


def nearest(word: str, choices: Iterable[str], count: int = 3) -> str:
    """Return `" (did you mean 'a' or 'b'?)"` for the closest choices, or an empty string."""
    found = difflib.get_close_matches(word, list(dict.fromkeys(choices)), n=count, cutoff=0.5)
    return f" (did you mean {' or '.join(repr(item) for item in found)}?)" if found else ""
