"""Schedules: policies over one machinery, chosen by name."""
