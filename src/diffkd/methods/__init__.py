"""Distillation methods: one paper, one file, one module."""
