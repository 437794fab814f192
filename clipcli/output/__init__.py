"""Rows on their way out: one small class a format."""
