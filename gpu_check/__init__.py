"""What only a GPU can show, the cheapest first, in one command: ``make gpu-check``; one module a kind of item."""
