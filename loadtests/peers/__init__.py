"""Other servers that the same columns can be put behind: a folder each, with its tuning and pins."""
