"""`python -m optgptq_cli` is the same as `optgptq`."""

from optgptq_cli.main import run

run()
