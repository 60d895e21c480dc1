"""Trains the demo model, from gathering its text to measuring the result. ``python -m exporter.train_demo`` runs it."""
