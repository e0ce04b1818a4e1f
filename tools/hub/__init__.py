"""The publisher: keys, packing, the signed repository, fleet commands."""
