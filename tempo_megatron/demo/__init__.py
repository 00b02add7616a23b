"""The demo: a small task whose majority is often wrong and whose answers are easier to check than to find."""
