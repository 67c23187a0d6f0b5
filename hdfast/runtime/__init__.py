"""What a run relies on: errors, checkpoints, the run directory, logs, progress, devices, profiling ranges."""
