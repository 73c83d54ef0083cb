"""The engines that a real user trains on."""
