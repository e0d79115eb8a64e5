"""Tasks: what a batch is, how an output becomes a loss, which metric says how good it is."""
