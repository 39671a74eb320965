"""What libraries raise and print about a file of somebody else: one sentence, and nothing besides."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from dualfocus.runtime.errors import InputError


def printable(text: str) -> str:
    """What is shown of a text that others wrote: one line, and not too long a one."""
    return "".join(character if character.isprintable() else " " for character in text)[:300]


@contextmanager
def foreign(problem: str, error: type[InputError]) -> Iterator[None]:
    """Make an `error`, "`problem`: …", of whatever a library raises, but for an `error` itself.

    Rust code that panics raises PanicException, which is no Exception.
    """
    try:
        yield
    except error:
        raise
    except BaseException as raised:
        if not isinstance(raised, Exception) and type(raised).__name__ != "PanicException":
            raise
        first_line = (str(raised).strip() or type(raised).__name__).splitlines()[0]
        raise error(f"{problem}: {printable(first_line.partition('. ')[0])}") from None


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
