"""Audits: what compression did to a model, with intervals, verdicts and checks of whether the numbers mean anything."""
