"""Models as replicas on a Ray cluster, each in its own process with its own card. The only package that imports ray."""
