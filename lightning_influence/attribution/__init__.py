"""Asks methods, returns scores."""
