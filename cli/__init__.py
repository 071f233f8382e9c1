"""Command line of optgptq: parsing and terminal output only."""
