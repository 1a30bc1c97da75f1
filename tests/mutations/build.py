"""Builds that were measured too seldom, or that say another time than they took."""

from __future__ import annotations

from experiments.bench import bench
from tests.mutations.baseline import build_slower
from tests.mutations.mutation import SMOLLM2, Mutation, Patch

KIND = "build"
MUTATIONS = [
    Mutation(KIND, "one reading", "the build was measured", (Patch(bench, "BUILDS", lambda count: 1),)),
    Mutation(KIND, "a build of ten times the seconds", "the build took", (build_slower(10),), SMOLLM2),
    Mutation(KIND, "two of three builds ten times slower", "the build took", (build_slower(10, (1, 2)),), SMOLLM2),
    Mutation(KIND, "a build of a tenth of the seconds", "work of build", (build_slower(0.1),), SMOLLM2),
]
