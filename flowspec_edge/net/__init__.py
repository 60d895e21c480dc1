"""Who is there, and how nodes speak: links, mDNS, TLS."""
