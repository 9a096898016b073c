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
