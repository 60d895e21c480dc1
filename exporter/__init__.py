"""Turns checkpoints into bundles. torch and optimum live here alone."""
