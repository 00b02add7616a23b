"""The typed tree of all settings: its schema, how a file fills it, and what is refused before a model is built."""
