"""Errors whose message is meant for the person at the terminal."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """The input (a flag, a file, a name) cannot be used.  The message is one clear sentence: which argument, what was
    expected, what was found, what to do.  A command prints it without a traceback and exits with code 2."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the closest valid name, then every valid one."""
    names = sorted(choices)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.0)
    listed = ", ".join(names) if names else "none"
    return f"did you mean {close[0]!r}? (valid: {listed})" if close else f"valid: {listed}"
