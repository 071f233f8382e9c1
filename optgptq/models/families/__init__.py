"""One file per group of model families that share their shape; each family is a record."""
