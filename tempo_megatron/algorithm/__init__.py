"""TEMPO's arithmetic in plain PyTorch: no Megatron, no vLLM, no communication.

Shapes and conventions of the whole room:

* N rows (responses) of ``T_i`` tokens, ``T`` the tokens of the rows that this rank holds, one row behind the other.
  Every function gives the same numbers whatever the order of the rows and their split into micro-batches and over
  ranks: facts of rows ``[N]`` are known everywhere, and a statistic of all tokens takes a ``statistics.Gather``.
* A row has ``T_i + 1`` values: state ``t < T_i`` is ``V(x, y_<t)``, read before token t (0-based), so a baseline never
  knows the action it is for; state ``T_i`` is ``V(x, y)``, read after the last token.
* A loss is of one micro-batch: n rows, padded to the longest of them; ``mask [n, L]`` bool is True on the response
  tokens, which are the first ``T_i`` columns of row i, and whatever stands beyond is not read.
* Outcomes are 1 (correct) and 0 (wrong); on unlabeled rows they are NaN and never read.
"""
