"""OpenAI's Files and Batches API: many requests in one file, answered while nothing else waits."""
