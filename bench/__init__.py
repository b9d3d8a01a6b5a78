"""What the gateway costs beside nginx, measured on one machine: `python -m bench --help`."""
