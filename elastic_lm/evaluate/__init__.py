"""How good a trained model is: figures with their intervals, from held-out text and from tasks of the user's own.

Invariant: one process, and the same weights, task and machine give the same figures. A task that cannot be answered is refused
before the model is loaded.
"""
