"""Using a trained student: from its folder alone."""
