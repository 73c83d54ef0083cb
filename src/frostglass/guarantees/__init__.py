"""What theory says without running an attack: bounds, conversions between notions of privacy, and intervals."""
