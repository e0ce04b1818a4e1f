"""The model's own process: zygote, sandbox, handler, batcher, runtime."""
