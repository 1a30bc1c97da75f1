"""Where the jobs of a sweep run: Hydra launchers for Slurm and Ray."""
