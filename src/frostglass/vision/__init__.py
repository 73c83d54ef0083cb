"""Images and networks: datasets, built-in models, weights."""
