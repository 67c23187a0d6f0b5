"""What carries a run: errors, checkpoints, the run directory, logs, progress, devices, profiling ranges."""
