"""Calls methods for a user's question and returns scores."""
