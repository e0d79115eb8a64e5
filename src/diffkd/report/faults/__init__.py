"""Where a student errs: kept while its answers pass by, written as tables and pictures."""
