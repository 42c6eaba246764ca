"""The methods, one file per paper, and their base classes."""
