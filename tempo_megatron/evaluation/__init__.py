"""What a policy and its critic can do: accuracy, coverage, majority, diversity, calibration, each with its interval."""
