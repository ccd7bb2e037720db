"""Room: softmax and log-softmax at a temperature, a number or one for each row."""

from fastdistill.softmax.api import temperature_log_softmax, temperature_softmax

__all__ = ["temperature_log_softmax", "temperature_softmax"]
