"""What measures: benchmarks, calibration of policies, their evaluation, the hardware."""
