"""MemScheduler: finds the stable, often used text memories and keeps them as KV ahead of time.

Uses are observed (`observations`), a policy ranks the memories (`policies/`), the planner turns the ranking into builds
and moves between tiers, and a prompt is answered with the stored prefix that saves most (`prefix_selection`).
"""

from kvmem.scheduler.cost_model import Costs
from kvmem.scheduler.events import MemoryEvent
from kvmem.scheduler.planner import Move, Planner
from kvmem.scheduler.scheduler import MemScheduler
from kvmem.scheduler.stats import MemoryInfo, SchedulerStats, TierStats

__all__ = ["Costs", "MemScheduler", "MemoryEvent", "MemoryInfo", "Move", "Planner", "SchedulerStats", "TierStats"]
