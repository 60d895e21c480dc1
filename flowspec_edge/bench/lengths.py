"""The length of a comparison's texts where the user gives none."""

VIRTUAL_TOKENS, EMULATED_TOKENS = 96, 48
"""New tokens of each text on the virtual clock, and on emulated boards. The latter run in real time: with this many
tokens a testbed takes about three minutes.
"""
