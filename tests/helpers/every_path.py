"""Every noise path there is."""

import pytest

from score_sde.schedulers.paths import SDE_TYPES, DiscreteVPSDE


SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
CHAINS = {schedule: DiscreteVPSDE.from_beta_schedule(beta_schedule=schedule) for schedule in SCHEDULES}
# every path there is, and the chain of every schedule
PATHS = {name: build() for name, build in SDE_TYPES.items()} | {f"{name}_chain": path for name, path in CHAINS.items()}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
