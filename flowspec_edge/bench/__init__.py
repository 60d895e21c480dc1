"""Measures and compares schedules, on simulated time and on emulated boards."""
