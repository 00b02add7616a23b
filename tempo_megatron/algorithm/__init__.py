"""TEMPO's arithmetic in plain PyTorch: no Megatron, no vLLM, no communication.

Shapes and conventions of the whole room:

* N rows (responses), L the longest response of the batch; every function gives the same numbers whatever the
  padding, the order of the rows and the split into micro-batches.
* ``mask [N, L]`` bool is True on the response tokens, which are the first ``T_i`` columns of row i.
* ``values [N, L+1]``: column ``t < T_i`` is ``V(x, y_<t)``, read before token t (0-based), so a baseline never
  knows the action it is for; column ``T_i`` is ``V(x, y)``, read after the last token.  Columns beyond are garbage.
* Outcomes are 1 (correct) and 0 (wrong); on unlabeled rows they are NaN and never read.
"""
