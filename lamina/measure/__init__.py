"""What measures: benchmarks, calibration of policies, the hardware."""
