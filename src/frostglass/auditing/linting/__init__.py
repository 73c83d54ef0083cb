"""The linter of privacy configurations: reads what a framework was told, and says where it is not what it is called."""
