"""Trackers: they follow a fit step by step for methods that need it, and write what they find to disk."""
