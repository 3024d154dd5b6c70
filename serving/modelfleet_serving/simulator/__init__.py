"""An OpenAI server without a model: it answers with the timing, the queueing and the cache of an engine."""
