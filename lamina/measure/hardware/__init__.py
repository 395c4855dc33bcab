"""Measures this machine into what the simulator takes: bandwidth, GEMM, kernels, exchange, and the rest of a step.

`hardware_calibration` runs it all, `fitting` is its arithmetic; each kind of measuring has a file, and runs in
`children`.
"""

from lamina.measure.hardware.hardware_calibration import Calibration, calibrate

__all__ = ["Calibration", "calibrate"]
