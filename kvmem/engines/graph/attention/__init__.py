"""Attention kernels of the fast engine: one in each file, chosen by what this machine has."""

from kvmem.engines.graph.attention.base import Attention, attend, attend_lse, choose, kernels

__all__ = ["Attention", "attend", "attend_lse", "choose", "kernels"]
