"""`manage.py doctor`: what is wrong with an instance and with whatever stands before it, and what to do about it."""
