"""How long a schedule takes and what it keeps alive, from costs given as values.

``simulate(schedule, costs)`` gives all figures; ``run`` gives the times of each operation, from which
``attribution``, ``critical_path`` and ``memory_curve`` say why.
"""

from stretto.schedule.simulate.attribution import Attribution, attribution, critical_path
from stretto.schedule.simulate.bound import lower_bound
from stretto.schedule.simulate.clock import Timeline, run
from stretto.schedule.simulate.costs import Costs
from stretto.schedule.simulate.figures import Figures, figures_of, simulate
from stretto.schedule.simulate.memory import Curve, memory_curve, peak_activation
from stretto.schedule.simulate.network import Network
from stretto.schedule.simulate.stage_costs import StageCosts

__all__ = [
    "Attribution",
    "Costs",
    "Curve",
    "Figures",
    "Network",
    "StageCosts",
    "Timeline",
    "attribution",
    "critical_path",
    "figures_of",
    "lower_bound",
    "memory_curve",
    "peak_activation",
    "run",
    "simulate",
]
