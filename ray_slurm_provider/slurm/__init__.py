"""SLURM as typed questions and answers. Imports the standard library only."""
