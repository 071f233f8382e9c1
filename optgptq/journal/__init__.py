"""What a job has finished, kept beside its output so that it can go on after any end."""
