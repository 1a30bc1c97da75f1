"""Runs a configuration: cell by cell, with checkpoints, as a sweep, on several ranks or a cluster."""
