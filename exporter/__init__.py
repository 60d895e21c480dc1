"""Turns checkpoints into bundles. No other package of this project imports torch or optimum."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # see flowspec_edge/engine/__init__.py
