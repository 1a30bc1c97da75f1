"""Hydra launchers, which run the jobs of a sweep on Slurm or Ray."""
