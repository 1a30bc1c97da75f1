"""Policies: which memories are worth their bytes as KV. One policy in each file.

`policy(name)` finds one by its name, here or in an installed package (entry point group `kvmem.scheduler.policies`).
"""

from kvmem.scheduler.policies.base import POLICIES, Policy, policy, policy_classes
from kvmem.scheduler.policies.benefit_per_byte import BenefitPerByte
from kvmem.scheduler.policies.oracle import Oracle

__all__ = ["POLICIES", "BenefitPerByte", "Oracle", "Policy", "policy", "policy_classes"]
