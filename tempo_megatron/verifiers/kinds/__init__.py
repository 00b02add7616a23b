"""One file per kind of answer; each defines ``KIND: Kind`` and is found by being here.

A kind that needs a heavy library imports it inside its functions: every kind is loaded with the registry.
"""
