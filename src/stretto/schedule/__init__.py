"""When things happen: schedules as pure data, without torch.

``families.build`` makes one, ``validate`` proves that it is complete, ordered and can't deadlock,
``passes`` turn it into another (messages, split backward), ``simulate`` times it, ``render`` draws it.
"""

from stretto.schedule.op import Kind, Op
from stretto.schedule.schedule import Schedule

__all__ = ["Kind", "Op", "Schedule"]
