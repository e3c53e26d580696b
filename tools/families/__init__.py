"""Every causal language model that transformers has, tried on tiny random models: see `__main__`."""
