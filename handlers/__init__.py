"""Built-in handlers: raw request to tensors, tensors to answer. Imports nothing of the agent."""
