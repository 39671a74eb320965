"""dualfocus: an edge-optimised inference runtime for vision-language models that look twice.

from dualfocus import DualFocus

model = DualFocus()  # the built-in model
result = model.ask("photo.jpg", "What is written on the sign?")

Importing this package imports nothing else before one of its names is used.
"""

from __future__ import annotations

# typing's would be most of what is imported before the command line can handle Ctrl-C
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dualfocus.runtime import Bundle, DualFocus, FocusResult, Question

__all__ = ["Bundle", "DualFocus", "FocusResult", "Question"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dualfocus import runtime

    return getattr(runtime, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
