"""Builds an executor of a traced decoder: choices, passes, weights, compiled segments; a record of each graph."""
