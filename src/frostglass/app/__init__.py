"""What a person touches: command line, terminal, demo."""
