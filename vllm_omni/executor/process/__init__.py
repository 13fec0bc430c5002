"""Stages in processes of their own. `executor.ProcessExecutor` is the parent's half, `child` the process.

The parent starts the child with one end of a socket pair, which nobody else can have. Frames go over it
(`connection`), whose tensors lie in memory that both map (`segments`). In the child a `StageServant` holds the engine.
"""
