"""Ray's worker processes as forks of one that has imported everything: a process starts in 0.1 s of CPU, not in 2.5 s.

Most of what the tests on a cluster cost was the import of torch and Ray, hundreds of times. A raylet starts `launcher.py`
in place of its own starter; that asks the server (`server.py`), which forks the worker, and stays beside the worker as the
process that the raylet started. Each dies with the other. Workers with an environment of their own start as ever, and so
do those of every cluster that is not a `ForkingCluster`.
"""
