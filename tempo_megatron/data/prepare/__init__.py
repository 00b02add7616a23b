"""Public data sets that a user has on disk -> prompt parquet in the plain schema (``data/prompts.py``).

``tables`` reads files row by row, ``layouts`` says what a data set's columns must be, one module per family of data
sets turns rows into problems, ``registry`` names them, ``pipeline`` does the work and ``command`` is the command line.
"""
