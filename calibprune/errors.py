"""The errors a user can mend, which the command line prints in one line and exits for with code 2; and those that
merely want the same command again (exit code 1)."""


class UserError(Exception):
    """Bad input: the message names the thing, its value and what would be right."""


class DriftError(UserError):
    """A resume with settings or inputs other than those the unfinished stage was planned with."""


class CorruptionError(UserError):
    """A committed file is missing, damaged or foreign: its hash is not the one that was recorded."""


class LeaseLost(UserError):
    """Another driver took over the run: this one must stop."""


class LeaseExpired(RuntimeError):
    """The lease could not be renewed in time, so that another driver may take over: this one must stop."""


class StoreUnavailable(OSError):
    """A store kept failing in ways that pass: nobody's input is to blame, the same command may do later."""


class ClusterUnavailable(OSError):
    """A cluster's job server does not answer, or says that it cannot for now: the same command may do later."""
