"""The doctor: examines what a start needs, and says of each part what is wrong and what mends it.

It changes nothing: no table, no row, no key in Redis. `rounds` is the whole examination.
"""
