"""What a policy can do: accuracy over samples, coverage, majority, diversity."""
