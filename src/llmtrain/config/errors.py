"""Errors that are shown to the user: one clear text, no traceback, an exit code."""


class UserError(ValueError):
    """Something the user can mend. The message names the place, says what was expected and what to do."""

    exit_code = 1


class ConfigError(UserError):
    """A fault in the configuration: found before torch is loaded and before anything is written."""

    exit_code = 2


class DataError(UserError):
    """A fault in data that was handed in: a missing file, a broken line, an empty set."""

    exit_code = 2


class Stopped(UserError):
    """The run ended where it was told to, before its last step, and has saved."""


class Preempted(UserError):
    """The run was asked to end (SIGTERM), has saved, and goes on by the same command.

    128 + 15 is what shells and schedulers know of a process that SIGTERM has ended, so they take it for what it is: not
    finished, and not failed by itself.
    """

    exit_code = 143
