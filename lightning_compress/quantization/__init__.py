"""Quantization: fake quantizers that train, calibration after training, bit allocation, and real integer models."""
