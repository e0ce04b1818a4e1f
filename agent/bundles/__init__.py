"""Signed bundles: store, trust, download, activation. Only code here turns fetched bytes into a bundle."""
