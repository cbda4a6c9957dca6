"""Photographs -> Tokens."""
