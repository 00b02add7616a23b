"""TEMPO (test-time training by Expectation-Maximisation) on Megatron-Core and vLLM."""

__version__ = "0.1.0"
