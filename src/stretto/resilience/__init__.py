"""What a run does when something goes wrong: notice, say which rank and why, end or save in time.

oplog        what each rank did last, in a file that survives it (the runtime's Observer)
heart, place every rank beats into its file, and says where its main thread is
beat, judge  who is silent, when does all hang
diagnose     one sentence: who waits for what from whom, and where that one is (stack: ask it, even if frozen)
lookout      our launcher judges by the files
watchdog     under another launcher the ranks judge each other, through a store
stall        who was waited for where nothing moved for a moment
first_error  the root cause is shown, not the ranks that merely noticed
inject       faults on purpose (run.drill)
preemption   SIGTERM means: stop with a checkpoint at the next step
parent       no rank outlives its launcher
"""

from stretto.resilience.first_error import FirstErrors, RankFailure, describe, place_of_error
from stretto.resilience.heart import Heart
from stretto.resilience.inject import Drill, DrillError
from stretto.resilience.lookout import Lookout
from stretto.resilience.oplog import Log, Operation, OpLog, log_path, read_log
from stretto.resilience.parent import die_with_parent
from stretto.resilience.preemption import StopRequest
from stretto.resilience.stack import answer
from stretto.resilience.stall import Stall, read_stalls
from stretto.resilience.watchdog import EXIT_CODE, Watchdog, connect

__all__ = [
    "EXIT_CODE",
    "Drill",
    "DrillError",
    "FirstErrors",
    "Heart",
    "Log",
    "Lookout",
    "OpLog",
    "Operation",
    "RankFailure",
    "Stall",
    "StopRequest",
    "Watchdog",
    "answer",
    "connect",
    "describe",
    "die_with_parent",
    "log_path",
    "place_of_error",
    "read_log",
    "read_stalls",
]
