"""What a run does when something goes wrong: notice, say which rank and why, end or save in time.

oplog        what each rank did last, in a file that survives it (the runtime's Observer)
watchdog     every rank beats; a silent rank or a hang ends the run within a minute
first_error  the root cause is shown, not the ranks that merely noticed
preemption   SIGTERM means: stop with a checkpoint at the next step
parent       no rank outlives its launcher
"""

from stretto.resilience.first_error import FirstErrors, RankFailure, describe
from stretto.resilience.oplog import Log, Operation, OpLog, log_path, read_log
from stretto.resilience.parent import die_with_parent
from stretto.resilience.preemption import StopRequest
from stretto.resilience.watchdog import EXIT_CODE, Watchdog, connect

__all__ = [
    "EXIT_CODE",
    "FirstErrors",
    "Log",
    "OpLog",
    "Operation",
    "RankFailure",
    "StopRequest",
    "Watchdog",
    "connect",
    "describe",
    "die_with_parent",
    "log_path",
    "read_log",
]
