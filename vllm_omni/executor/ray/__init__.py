"""Stages as actors of a Ray cluster. `executor.RayExecutor` is the half beside the loop, `actor.StageActor` the actor.

What they say to each other are frames (`frame`): bytes of the wire, and uint8 arrays that Ray keeps in its object store
where they are large. `cluster.RayCluster` connects to Ray and places the actors of one pipeline.
"""
