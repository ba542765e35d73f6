"""The cluster side: the only package that imports ray."""
