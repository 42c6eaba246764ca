"""A dataset as blocks of examples."""
