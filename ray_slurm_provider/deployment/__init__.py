"""What `ray-slurm deploy` does: asks a site what it has, proposes node types, writes the files."""
