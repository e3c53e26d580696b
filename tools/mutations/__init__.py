"""Breaks the product in one place at a time and shows which tests notice: see `__main__`."""
