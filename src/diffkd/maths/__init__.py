"""Diffusion, layers, losses, random numbers: pure functions and small modules."""
