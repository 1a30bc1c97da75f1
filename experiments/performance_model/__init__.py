"""Models of the hardware: calibrated rates, the roofline limit, and a predictor of TTFT."""

from experiments.performance_model.calibration import calibrate, datasheet
from experiments.performance_model.fit import Fit, Point, fit_engine, points_of
from experiments.performance_model.fleet import Tier, break_even_tokens, size_fleet
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
    "fit_engine",
    "points_of",
    "size_fleet",
]
