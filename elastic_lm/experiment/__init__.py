"""Runs as experiments. No ray.

One made of another (fork.py), and where it is from; all of a store at a glance, two side by side; one that goes back before a
loss spike (spikes.py, rewinds.py); and attempts after a plan, one after another until one reaches a target (plan.py, loop.py).
"""
