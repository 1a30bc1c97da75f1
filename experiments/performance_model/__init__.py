"""What the hardware allows: calibrated rates, the roofline, and a predictor of TTFT."""

from experiments.performance_model.calibration import calibrate, datasheet
from experiments.performance_model.fit import Fit, Point, described, points_of
from experiments.performance_model.fleet import Tier, break_even_tokens
from experiments.performance_model.predictor import Engine, Layout, Prefill
from experiments.performance_model.roofline import DenseShape, Rates, Roofline

__all__ = [
    "DenseShape",
    "Engine",
    "Fit",
    "Layout",
    "Point",
    "Prefill",
    "Rates",
    "Roofline",
    "Tier",
    "break_even_tokens",
    "calibrate",
    "datasheet",
    "described",
    "points_of",
]
