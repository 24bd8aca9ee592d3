"""Distillation: losses, taps, teachers and the step pipeline."""
