"""The one error of this room, kept apart so that naming it imports nothing heavy."""

from __future__ import annotations

from dualfocus.runtime.errors import InputError


class ExportError(InputError):
    """A checkpoint that cannot become a bundle; the message is one sentence for its owner."""
