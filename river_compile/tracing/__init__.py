"""From a call of a model to its program: known, on disk, derived, traced from a few layers, or found by Dynamo."""
