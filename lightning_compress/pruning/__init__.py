"""Pruning: criteria, thresholds, masks and the physical removal of channels."""
