"""Tokens of two photographs -> correspondences and a geometry."""
