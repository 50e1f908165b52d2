"""Many pruning runs at once: jobs, the run directory, workers, executors, tracking, progress.

Nothing is imported here: a driver that only reads results must start without Ray, MLflow or torch.
"""
