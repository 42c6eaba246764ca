"""Inverse curvatures for influence functions and SOURCE, one file per method of inversion."""
