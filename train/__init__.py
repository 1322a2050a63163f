"""The training driver: `python -m train` from the root of a checkout."""
