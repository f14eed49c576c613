"""What runs in the job: a small supervisor around ``ray start``. Imports the standard library only."""
