"""Turns checkpoints into bundles. No other package of this project imports torch or optimum."""
