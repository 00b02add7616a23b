"""What a job takes, before it is started: bytes, operations and seconds by arithmetic, from config.json alone."""
