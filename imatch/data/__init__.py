"""Photographs, and what is stored of them."""
