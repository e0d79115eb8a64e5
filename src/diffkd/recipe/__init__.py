"""Recipes: the typed description of one run."""
