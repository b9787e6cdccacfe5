"""Generation: sampling, state cache, streaming and the captured one-token step."""
