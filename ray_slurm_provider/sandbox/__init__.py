"""A real SLURM on one machine: munged, slurmctld and one slurmd per virtual node, without systemd."""
