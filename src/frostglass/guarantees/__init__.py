"""Theory: bounds and accounting, no tensors trained."""
