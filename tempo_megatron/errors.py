"""Errors that are told to the user as one line, without a traceback."""

from __future__ import annotations


class TempoError(Exception):
    """Something the user can mend: names the file, the key or column, the value and what would be right.

    ``exit_code`` is the process's exit status (2: bad input or configuration, 3: the run itself failed,
    such as a NaN loss).
    """

    exit_code = 2


class RunError(TempoError):
    """The run cannot go on (NaN loss, gate not passed, verifier lost); what was saved stays valid."""

    exit_code = 3
