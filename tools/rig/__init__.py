"""What bench, soak and fuzz stand on: models made here and now, and a box that serves them."""
