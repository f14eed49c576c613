"""Where Ray nodes run."""
