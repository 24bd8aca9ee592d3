"""Distillation: losses, taps on student and teacher, teachers, and what feeds them to the step pipeline."""
