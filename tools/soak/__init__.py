"""Hours of trouble for a running daemon, and the question whether anybody noticed."""
