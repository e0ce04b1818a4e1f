"""One module per inference runtime, behind one protocol."""
