"""How long a schedule takes and what it keeps alive, from costs given as values.

``simulate(schedule, costs)`` gives all figures; ``run`` gives the times of each operation.
"""

from stretto.schedule.simulate.bound import lower_bound
from stretto.schedule.simulate.clock import Timeline, run
from stretto.schedule.simulate.costs import Costs
from stretto.schedule.simulate.figures import Figures, simulate
from stretto.schedule.simulate.memory import peak_activation
from stretto.schedule.simulate.stage_costs import StageCosts

__all__ = ["Costs", "Figures", "StageCosts", "Timeline", "lower_bound", "peak_activation", "run", "simulate"]
