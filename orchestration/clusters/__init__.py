"""Launching Ray clusters: here, on Slurm, on Kubernetes, on virtual machines and over SSH.

A :class:`~orchestration.clusters.shape.Shape` says what a cluster is; every other file turns it
into what one kind of place wants to read. They are plain functions of values and start nothing,
except :mod:`orchestration.clusters.local`.
"""
