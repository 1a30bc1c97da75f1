"""The arms of a load: ways to serve requests that use a memory, with kvmem and without. One in each file."""

from experiments.load_arms.base import ARMS, LoadArm, Sent, arm_of, every_arm

__all__ = ["ARMS", "LoadArm", "Sent", "arm_of", "every_arm"]
