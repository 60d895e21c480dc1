"""Links, discovery and the HTTP interface: the only importer of aiohttp servers and zeroconf."""
