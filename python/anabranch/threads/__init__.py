"""The books of a prompt's threads: queues, tasks, clocks, tokens and how children come back; no cache and no model.

Whatever runs threads keeps them: the engine adds KV and a forward (`anabranch.engine`), a client of a server adds
requests to it.
"""
