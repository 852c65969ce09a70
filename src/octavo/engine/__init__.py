"""Many requests at once: a durable queue, workers that serve it, and batches that form and dissolve step by step."""
