"""Pure tensor functions: the hot code, tested and benchmarked one by one."""
