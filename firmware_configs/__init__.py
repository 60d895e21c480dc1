"""Board profiles (``*.toml``), and what makes a freshly flashed card join; see README.md. Data only."""
