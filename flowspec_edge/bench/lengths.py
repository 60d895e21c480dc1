"""How long the texts of a comparison are, where the user does not say."""

VIRTUAL_TOKENS, EMULATED_TOKENS = 96, 48
"""What runs in real time is short by default: with these, about three minutes on a testbed."""
