"""Speed of our engine against what it replaces. Every figure is a ratio of two commands run in turn."""
