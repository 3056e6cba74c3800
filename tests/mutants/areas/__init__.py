"""Lists of small mistakes, one file an area."""
