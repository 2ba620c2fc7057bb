"""Errors that the user can fix, for which the command line prints one line and exits with code 2; and errors after
which the same command may succeed later (exit code 1)."""


class UserError(Exception):
    """Bad input. The message names the thing, its value and what would be right."""


class DriftError(UserError):
    """A resumed run has other settings or inputs than those that the unfinished stage was planned with."""


class CorruptionError(UserError):
    """A committed file is missing, damaged or foreign: its hash is not the recorded one."""


class LeaseLost(UserError):
    """Another driver took over the run, so that this one must stop."""


class LeaseExpired(RuntimeError):
    """The lease could not be renewed in time. Another driver may take over, so that this one must stop."""


class StoreUnavailable(OSError):
    """A store kept failing with transient errors. No input is to blame; the same command may succeed later."""


class ClusterUnavailable(OSError):
    """A cluster's job server does not answer, or fails with transient errors; the same command may succeed later."""
