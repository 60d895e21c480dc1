"""Run one large language model across the small boards on your LAN."""
