"""The programs that are compared; each rank runs one as a module."""
