"""One published or own inversion recipe a file."""
