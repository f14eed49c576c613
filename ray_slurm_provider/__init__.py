"""Lets Ray's autoscaler run on any SLURM cluster: each Ray node is a batch job."""

__version__ = "0.1.0"
