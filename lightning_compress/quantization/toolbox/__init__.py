"""The steps of quantization after training: equalization, smoothing, rounding, corrections, and what they share."""
