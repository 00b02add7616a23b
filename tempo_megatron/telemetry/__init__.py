"""What a run tells about itself: metrics sinks, live progress, phase ledger, curves and the report.

The modules are imported one by one (``telemetry.metrics``, ``telemetry.report``, ...) so that a light
process, such as ``tempo-megatron report``, does not load torch.
"""
