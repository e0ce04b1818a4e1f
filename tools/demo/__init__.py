"""The end-to-end demonstration: real model, real store, real broker."""
