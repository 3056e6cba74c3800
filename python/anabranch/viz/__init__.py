"""Pictures of a generation: the story of its threads, drawn in a terminal, and its score card."""
