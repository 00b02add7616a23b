"""Mathematical answers: cleaned text, units, structure, and values that math-verify's parser reads.

``compare.equal`` is the way in.  Only single expressions reach math-verify (and so sympy); sets, tuples, intervals,
matrices, relations and units are taken apart here, where it can be seen what counts as equal.
"""
