"""`python -m optgptq_cli` is the same as `optgptq`."""

from .main import run

run()
