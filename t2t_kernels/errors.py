"""Errors and their wording, shared by the kernels and the models."""

import difflib
from collections.abc import Iterable

# Longer lists are not printed in full.
MOST_LISTED = 100


class BackendUnavailable(RuntimeError):
    """The named backend cannot run this call; the message gives the reason."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str:
    """The message for a name that is not in ``known``: with the nearest name, or all if they are few."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    if near:
        return f"unknown {kind} {name!r}; did you mean {near[0]!r}?"
    if len(known) > MOST_LISTED:
        near = difflib.get_close_matches(str(name), known, n=5, cutoff=0)
        return f"unknown {kind} {name!r}; the nearest of {len(known)}: {', '.join(near)}"
    return f"unknown {kind} {name!r}; known: {', '.join(known)}"
