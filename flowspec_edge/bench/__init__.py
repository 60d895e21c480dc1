"""Measuring schedules: the real cores and the real model, on simulated time."""
