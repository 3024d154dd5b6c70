"""The OpenAI data plane: finds the model of a request and relays it to one of its engines."""
