"""The machine that a run is made for, the machine that it finds, and what a job asks a cluster for."""

from experiments.hardware.layout import CARDS, Hardware, cores, read_card
from experiments.hardware.resources import Resources, resources_of

__all__ = ["CARDS", "Hardware", "Resources", "cores", "read_card", "resources_of"]
