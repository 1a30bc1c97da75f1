"""Hardware: the layout that a run is configured for, the machine that it finds, and the resources of a job."""

from experiments.hardware.layout import CARDS, Hardware, cores, read_card
from experiments.hardware.resources import Resources, resources_of

__all__ = ["CARDS", "Hardware", "Resources", "cores", "read_card", "resources_of"]
