"""Vectors -> hits."""
