"""Processes on one node and many: who this rank is, and how ranks are started."""
