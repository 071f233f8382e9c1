"""Shipped recipes, the bundled model and its texts; read through `optgptq.recipe` and `optgptq.bundled`."""
