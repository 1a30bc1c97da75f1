from __future__ import annotations

import pytest

from experiments.performance_model import calibration


@pytest.fixture(autouse=True)
def short_calibration(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Each run of a test measures the machine's rates for half a second, which is long for a tiny model's products.

    test_calibration_measures_plausible_rates measures as long as users do.
    """
    if request.node.name != "test_calibration_measures_plausible_rates":
        monkeypatch.setattr(calibration, "CALIBRATION_S", 0.5)
