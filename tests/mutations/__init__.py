"""Plants faults in the product, one at a time, and demands that a run says so: `python -m tests.mutations`."""
