"""The interceptor inside vLLM: its loaders, the wrapper around `generate`, weight swaps, the engine's state.

Everything that knows how vLLM looks inside lies here.
"""
