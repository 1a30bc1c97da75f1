"""Checks what a run's folder says against the samples that it stores, and measures a cell anew."""

from experiments.audit.finding import Finding
from experiments.audit.folder import Audit, audit
from experiments.audit.rerun import measure_anew

__all__ = ["Audit", "Finding", "audit", "measure_anew"]
