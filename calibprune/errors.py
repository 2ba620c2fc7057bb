"""The errors a user can mend. The command line prints them in one line and exits with code 2."""


class UserError(Exception):
    """Bad input: the message names the thing, its value and what would be right."""


class DriftError(UserError):
    """A resume with settings or inputs other than those the unfinished stage was planned with."""


class CorruptionError(UserError):
    """A committed file is missing, damaged or foreign: its hash is not the one that was recorded."""


class LeaseLost(UserError):
    """Another driver took over the run, or may have: this one must stop."""
