"""The ledger as operators see it: keys and grants to work with, records and sums to look at."""

from billing.admin import grants, keys, prices, usage

__all__ = ["grants", "keys", "prices", "usage"]
