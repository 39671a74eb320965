"""The one error of this room, kept apart so that naming it imports nothing heavy."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from dualfocus.runtime.errors import InputError


class ExportError(InputError):
    """A checkpoint that cannot become a bundle; the message is one sentence for its owner."""


def first_line(error: BaseException) -> str:
    """What `error` says, as a part of one sentence."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0])


def printable(text: str) -> str:
    """What is shown of a text that others wrote: one line, and not too long a one."""
    return "".join(character if character.isprintable() else " " for character in text)[:300]


@contextmanager
def foreign(problem: str) -> Iterator[None]:
    """Make an ExportError, "`problem`: …", of whatever a library raises at a file of somebody else.

    Rust code that panics raises PanicException, which is no Exception.
    """
    try:
        yield
    except ExportError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ExportError(f"{problem}: {first_line(error)}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back libraries' warnings, which are about their own insides; errors still come through."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
