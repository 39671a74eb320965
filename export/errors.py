"""The one error of this room, kept apart so that naming it imports nothing heavy."""


class ExportError(ValueError):
    """A checkpoint that cannot become a bundle; the message is one sentence for its owner."""
