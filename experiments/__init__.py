"""Experiments: what injecting memories buys, measured, with a verdict on every figure.

`python -m experiments.run` is the command line.
"""
