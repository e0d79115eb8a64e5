"""Features read out of any model, and where to read them."""
