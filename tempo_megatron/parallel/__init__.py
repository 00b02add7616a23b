"""Process groups, the device seam (cuda | cpu), seeds and collectives that tell errors."""
