"""What a run rests on: packages, the machine, folders, Slurm. One function a check; nothing heavy at import."""
